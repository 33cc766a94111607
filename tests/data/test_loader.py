from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from selfsup_xbn.data import (
    Batches,
    ClassBalancedBatches,
    ImageData,
    RandomBatches,
    Split,
    eval_batches,
    load_data,
    raw_pixels,
)
from selfsup_xbn.data.files import seeded
from selfsup_xbn.errors import UserError


@pytest.fixture
def memory() -> ImageData:
    images = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(torch.arange(200) % 20, images)
    return ImageData("memory", split, split.subset(torch.arange(30)), image_size=16, mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.fixture
def files(tree) -> ImageData:
    sizes = [(24 + i, 40 - i) for i in range(14)]
    return load_data(f"folder:{tree(train={'ant': sizes, 'bee': sizes}, test={'ant': sizes})}")


@pytest.fixture(params=["memory", "files"])
def data(request) -> ImageData:
    return request.getfixturevalue(request.param)


def batches(data: ImageData, **options) -> Batches:
    options = {"sampler": RandomBatches(len(data.train), 6), "views": 2, "seed": 7, **options}
    return Batches(data.train, options.pop("augmentation", "photo"), data=data, **options)


def assert_equal_batches(ours, theirs) -> None:
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one.index, two.index)
        assert torch.equal(one.labels, two.labels)
        assert all(torch.equal(a, b) for a, b in zip(one.views, two.views, strict=True))


@pytest.mark.parametrize("views", [1, 2, 3])
def test_batch_holds_views_labels_and_indices_of_its_samples(data, views):
    loader = batches(data, views=views)
    epoch = list(loader.epoch(0))
    assert len(epoch) == len(loader)
    side = data.image_size
    for batch, index in zip(epoch, loader.sampler.epoch(7, 0), strict=True):
        assert torch.equal(batch.index, index)
        assert torch.equal(batch.labels, data.train.labels[index])
        assert [view.shape for view in batch.views] == [(6, 3, side, side)] * views
    assert all(not torch.equal(a, b) for a, b in zip(epoch[0].views, epoch[0].views[1:], strict=False))


@pytest.mark.parametrize("augmentation", ["photo", "supervised"])
def test_starting_late_gives_the_rest_of_the_epoch(data, augmentation):
    whole = list(batches(data, augmentation=augmentation).epoch(2))
    assert_equal_batches(batches(data, augmentation=augmentation).epoch(2, start=3), whole[3:])


def test_epochs_and_seeds_give_other_views_of_the_same_sample(data):
    def view(seed, epoch):
        batch = next(batches(data, seed=seed).epoch(epoch))
        return batch.views[0][0]

    assert not torch.equal(view(0, 0), view(0, 1))
    assert not torch.equal(view(0, 0), view(1, 0))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("augmentation", ["photo", "supervised"])
def test_number_of_workers_changes_nothing(files, augmentation):
    one, two = (batches(files, augmentation=augmentation, workers=workers) for workers in (0, 2))
    assert_equal_batches(two.epoch(1), one.epoch(1))
    next(two.epoch(0))  # an epoch left early does not disturb the next
    assert_equal_batches(two.epoch(3), one.epoch(3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("world", [3, 4])
def test_shards_have_all_labels_and_their_share_of_views(data, world):
    whole = list(batches(data).epoch(1))
    shards = [list(batches(data, shard=(rank, world)).epoch(1)) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert all(torch.equal(part.index, batch.index) for part in parts)
        assert all(torch.equal(part.labels, batch.labels) for part in parts)
        for view in range(2):
            torch.testing.assert_close(torch.cat([part.views[view] for part in parts]), batch.views[view])


def test_without_augmentation_a_view_is_what_an_evaluation_sees(data):
    seen = torch.cat(list(eval_batches(data.train, data)))
    for batch in batches(data, augmentation="none").epoch(0):
        for view in batch.views:
            torch.testing.assert_close(view, seen[batch.index], atol=1e-6, rtol=1e-5)


def test_global_random_states_are_left_alone(data):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

    before = state()
    next(batches(data).epoch(0))
    next(eval_batches(data.test, data))
    assert state() == before


def test_all_three_random_states_are_seeded_and_put_back():
    def drawn():
        return torch.rand(1).item(), np.random.rand(), random.random()

    with seeded(1):
        first = drawn()
    outer = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    with seeded(1):
        assert drawn() == first
    with seeded(2):
        assert all(a != b for a, b in zip(drawn(), first, strict=True))
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()) == outer


def test_views_of_a_sample_resemble_it_more_than_another(memory):
    """A view keeps some of its image's colors: index, labels and views must belong together."""
    levels = torch.linspace(0, 255, 200).round().to(torch.uint8)
    flat = Split(torch.arange(200), levels[:, None, None, None].expand(200, 3, 16, 16).contiguous())
    loader = Batches(flat, "supervised", data=memory, views=2, sampler=ClassBalancedBatches(flat.labels, 50, 1), seed=0)
    for batch in loader.epoch(0):
        for view in batch.views:
            shades = (view * 0.2 + 0.5).mean((1, 2, 3)) * 255
            torch.testing.assert_close(shades, levels[batch.index].float(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_file_that_breaks_later_is_named_in_one_line(files, workers):
    with open(files.train.paths[9], "r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match=r"^\S*train/ant/009.png: [^\n]*$"):
        list(batches(files, workers=workers).epoch(0))
    with pytest.raises(UserError, match=r"^\S*train/ant/009.png: [^\n]*$"):
        list(eval_batches(files.train, files, workers=workers))


def test_unknown_augmentations_are_refused_with_the_choices(data):
    with pytest.raises(UserError, match=r"'foto' .*choose from .*photo"):
        batches(data, augmentation="foto")


def test_evaluation_takes_all_images_in_order_normalized(memory):
    result = torch.cat(list(eval_batches(memory.test, memory, batch_size=8)))
    torch.testing.assert_close(result, (memory.test.images / 255 - 0.5) / 0.2)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_resizes_the_short_side_and_crops_the_middle(files, workers):
    parts = list(eval_batches(files.test, files, batch_size=5, workers=workers))
    assert [len(part) for part in parts] == [5, 5, 4]
    for path, view in zip(files.test.paths, torch.cat(parts), strict=True):
        image = load(path)
        image = TF.center_crop(TF.resize(image, round(files.image_size / 0.875)), [files.image_size] * 2)
        torch.testing.assert_close(view, TF.normalize(TF.to_tensor(image), files.mean, files.std))


def load(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


def test_evaluation_treats_images_in_memory_like_files(tree):
    root = tree(train={"ant": [(40, 30)] * 2}, test={"ant": [(40, 30)] * 2})
    data, files = load_data(f"folder:{root}"), load_data(f"folder:{root}", cache_bytes=0)
    assert data.test.images is not None
    ours, theirs = (torch.cat(list(eval_batches(d.test, d))) for d in (data, files))
    one_level = 1 / 255 / min(data.std)  # Pillow rounds to bytes
    torch.testing.assert_close(ours, theirs, atol=1.01 * one_level, rtol=0)
    torch.testing.assert_close(raw_pixels(data.test), raw_pixels(files.test), atol=1.01 / 255, rtol=0)


def test_boxes_are_cut_out_before_anything_else(files):
    boxes = torch.tensor([[2, 3, 12, 13]]).repeat(len(files.test), 1)
    split = Split(files.test.labels, paths=files.test.paths, boxes=boxes)
    data = ImageData("boxes", split, split, image_size=10, mean=(0.0,) * 3, std=(1.0,) * 3)
    result = torch.cat(list(eval_batches(split, data)))
    for path, view in zip(files.test.paths, result, strict=True):
        torch.testing.assert_close(view, TF.to_tensor(load(path).crop((2, 3, 12, 13))))


def test_raw_pixels_are_the_pixels(memory):
    assert torch.equal(raw_pixels(memory.test), memory.test.images.flatten(1) / 255)
