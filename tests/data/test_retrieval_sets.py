from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits

from experiments.benchmarks.official_layouts import WRITERS, write_images
from selfsup_xbn.data import Batches, ImageData, RandomBatches, Split, eval_batches, load_data
from selfsup_xbn.evaluation import recall_at_k
from tests.official import drawing, fault, official, photo


def by_class(split: Split) -> dict[int, set[str]]:
    """The files of each label."""
    found: dict[int, set[str]] = {}
    for label, path in zip(split.labels.tolist(), split.paths, strict=True):
        found.setdefault(label, set()).add(path)
    return found


def test_sop_labels_follow_class_ids_train_before_test(tmp_path):
    data = load_data(official("sop", tmp_path, 0.01))
    first = 0
    for split, part, images in ((data.train, "train", 596), (data.test, "test", 605)):
        table = np.loadtxt(tmp_path / f"Ebay_{part}.txt", dtype=str, skiprows=1)
        assert len(table) == len(split) == images
        ids = sorted(set(table[:, 1]), key=int)
        assert len(ids) == 113
        assert by_class(split) == {
            number: {f"{tmp_path}/{path}" for path in table[table[:, 1] == label, 3]}
            for number, label in enumerate(ids, first)
        }
        first += len(ids)
    assert data.disjoint
    assert data.gallery is None
    assert data.num_classes == 226
    assert (data.image_size, data.augmentation) == (224, "photo")


def test_counts_are_compared_with_the_official_ones(tmp_path, monkeypatch):
    spec = official("sop", tmp_path, 0.01)
    monkeypatch.setattr("selfsup_xbn.data.datasets.sop.OFFICIAL", {"train": (596, 113), "test": (605, 112)})
    assert load_data(spec).notes == (
        "train: 596 images of 113 classes, as in the official data set",
        "warning: test: 605 images of 113 classes, but the official data set has 605 images of 112 classes",
    )


def test_set_without_path_is_in_its_folder_under_the_root(tmp_path):
    (tmp_path / "sop").mkdir()
    official("sop", tmp_path / "sop", 0.0005)
    assert load_data("sop", root=str(tmp_path)).train.paths == load_data(f"sop:{tmp_path}/sop").train.paths


@pytest.mark.parametrize("lists", [".", "Stanford_Online_Products"])
@pytest.mark.parametrize("images", [".", "Stanford_Online_Products"])
def test_sop_may_be_in_a_folder_of_its_own_name(tmp_path, lists, images):
    spec, inner = official("sop", tmp_path, 0.0005), tmp_path / "Stanford_Online_Products"
    entries = list(tmp_path.iterdir())
    inner.mkdir()
    for entry in entries:
        entry.rename(tmp_path / (lists if entry.suffix == ".txt" else images) / entry.name)
    data = load_data(spec)
    assert len(data.train) == 30
    assert all(Path(path).is_file() for path in [*data.train.paths, *data.test.paths])


def test_inshop_queries_and_gallery_share_items_not_images(tmp_path):
    data = load_data(official("inshop", tmp_path, 0.01))
    assert (len(data.train), len(data.test), len(data.gallery)) == (259, 142, 126)
    items = {}
    for split, part in ((data.train, "train"), (data.test, "query"), (data.gallery, "gallery")):
        assert all(path.endswith(f"_{part}.jpg") for path in split.paths)
        items[part] = {label: {Path(path).parent.name for path in paths} for label, paths in by_class(split).items()}
        assert all(names == {data.classes[label]} for label, names in items[part].items())
    assert items["query"] == items["gallery"]
    assert not items["train"].keys() & items["query"].keys()
    assert sorted(items["train"] | items["query"]) == list(range(80))
    assert data.disjoint


@pytest.mark.parametrize(("lists", "images"), [(".", "img"), ("Anno", "img"), ("Eval", "Img/img")])
def test_inshop_is_found_in_each_official_layout(tmp_path, lists, images):
    spec = official("inshop", tmp_path, 0.001)
    for place, wanted in (("Img/img", images), ("Eval/list_eval_partition.txt", f"{lists}/list_eval_partition.txt")):
        (tmp_path / place).rename(tmp_path / "moved")
        (tmp_path / wanted).parent.mkdir(exist_ok=True)
        (tmp_path / "moved").rename(tmp_path / wanted)
    data = load_data(spec)
    assert all(Path(path).is_file() for path in [*data.train.paths, *data.test.paths, *data.gallery.paths])


@pytest.mark.parametrize("below", [".", "CUB_200_2011"])
def test_cub200_trains_on_the_first_100_species(tmp_path, below):
    (tmp_path / below).mkdir(exist_ok=True)
    WRITERS["cub200"](tmp_path / below, 0.02, b"")
    data = load_data(f"cub200:{tmp_path}")
    assert (len(data.train), len(data.test), data.num_classes) == (117, 118, 200)
    for split, first in ((data.train, 0), (data.test, 100)):
        assert sorted(by_class(split)) == list(range(first, first + 100))
        for label, paths in by_class(split).items():
            assert {Path(path).parent.name for path in paths} == {f"{label + 1:03}.Bird"}


def test_cars196_trains_on_the_first_98_classes(tmp_path):
    data = load_data(official("cars196", tmp_path, 0.02))
    assert (len(data.train), len(data.test), data.num_classes) == (161, 163, 196)
    assert data.train.labels.max() == 97
    assert data.test.labels.min() == 98
    assert data.classes == [str(number) for number in range(1, 197)]
    assert [Path(path).name for path in data.train.paths] == [f"{number:06}.jpg" for number in range(1, 162)]


def test_cars196_devkit_is_split_by_class(tmp_path):
    (tmp_path / "devkit").mkdir()
    for file, folder, rows in (
        ("devkit/cars_train_annos.mat", "cars_train", [(3, "a.jpg"), (196, "b.jpg")]),
        ("cars_test_annos_withlabels.mat", "cars_test", [(3, "a.jpg"), (99, "c.jpg"), (98, "d.jpg")]),
    ):
        savemat(tmp_path / file, {"annotations": np.array(rows, [("class", object), ("fname", object)])})
        write_images((tmp_path / folder / name for _, name in rows), b"")
    data = load_data(f"cars196:{tmp_path}")
    files = [os.path.relpath(path, tmp_path) for path in data.train.paths]
    assert files == ["cars_train/a.jpg", "cars_test/a.jpg", "cars_test/d.jpg"]
    assert data.train.labels.tolist() == [0, 0, 1]
    assert data.test.labels.tolist() == [3, 2]


def test_cars196_image_folders_are_counted_and_disjoint(tree):
    root = tree(train={"001": [(9, 9)] * 3}, test={"099": [(9, 9)] * 2})
    data = load_data(f"cars196:{root}")
    assert data.name == f"cars196:{root}"
    assert data.notes[0] == (
        "warning: train: 3 images of 1 classes, but the official data set has 8,054 images of 98 classes"
    )
    (root / "train/001").rename(root / "train/099")
    assert "expected different classes in train and test" in fault(f"cars196:{root}")


@pytest.mark.parametrize(
    "parts", [("train", "test"), ("omniglot-py/images_background", "omniglot-py/images_evaluation")]
)
def test_omniglot_has_a_class_for_each_quarter_turn(tmp_path, parts):
    join = "_" if parts[0] == "train" else "/"
    for part, characters in zip(parts, (("Ac1", "Ac2", "Bc1"), ("Xc1", "Xc2")), strict=True):
        for seed, (alphabet, *character) in enumerate(characters):
            folder = tmp_path / part / f"{alphabet}{join}{''.join(character)}"
            folder.mkdir(parents=True)
            for copy in range(2):
                drawing(10 * seed + copy).save(folder / f"{copy}.png")
    data = load_data(f"omniglot:{tmp_path}", workers=0)
    assert (len(data.train), len(data.test)) == (3 * 2 * 4, 2 * 2 * 4)
    assert (data.disjoint, data.num_classes, len(data.classes)) == (True, 20, 20)
    upright = np.asarray(drawing(11).convert("L").resize((28, 28), Image.Resampling.BILINEAR))
    for turn in range(4):
        index = turn * 6 + 3
        assert np.array_equal(data.train.images[index, 0].numpy(), np.rot90(255 - upright, turn))
        assert data.train.labels[index] == turn * 3 + 1
        assert data.classes[turn * 3 + 1] == f"A{join}c2 {90 * turn}°"
    assert data.test.labels.tolist() == [12 + label for label in range(8) for _ in range(2)]
    assert data.classes[12] == f"X{join}c1 0°"


def test_omniglot_has_mean_0_and_deviation_1():
    real = os.environ.get("SELFSUP_XBN_DATA")
    if not real:
        pytest.skip("SELFSUP_XBN_DATA names no folder of real data")
    data = load_data(f"omniglot:{real}/omniglot", workers=1)
    assert (len(data.train), len(data.test)) == (4 * 3120, 4 * 1720)
    assert (len(data.train.labels.unique()), len(data.test.labels.unique())) == (624, 344)
    pixels = torch.cat(list(eval_batches(data.train, data)))
    assert abs(pixels.mean()) < 0.01
    assert abs(pixels.std() - 1) < 0.01


def test_disjoint_digits_are_all_digits_divided_at_five():
    data, source = load_data("digits-disjoint"), load_digits()
    pixels = np.round(source.data * 255 / 16).astype(np.uint8)
    assert data.disjoint
    assert (len(data.train), len(data.test)) == (901, 896)
    for split, part in ((data.train, source.target < 5), (data.test, source.target >= 5)):
        expected = zip(source.target[part].tolist(), map(bytes, pixels[part]), strict=True)
        ours = zip(split.labels.tolist(), map(bytes, split.images.numpy()), strict=True)
        assert sorted(ours) == sorted(expected)


def test_sop_queries_skip_themselves_inshop_search_the_gallery(tmp_path):
    sop, shop = tmp_path / "sop", tmp_path / "inshop"
    sop.mkdir()
    shop.mkdir()
    data = load_data(official("sop", sop, 0.001))
    # Each image has a direction of its own: only itself would be near.
    assert recall_at_k(torch.eye(len(data.test)), data.test.labels, ks=(1,))[1] < 50
    data = load_data(official("inshop", shop, 0.001))
    query, gallery, items = data.test.labels, data.gallery.labels, torch.eye(data.num_classes)
    assert recall_at_k(items[query], query, items[gallery], gallery, ks=(1,))[1] == 100


def check_batches(data: ImageData, augmentation: str, views: int) -> None:
    sampler = RandomBatches(len(data.train), 3)
    batch = next(Batches(data.train, augmentation, data=data, views=views, sampler=sampler).epoch(0))
    assert len(batch.views) == views
    for view in batch.views:
        assert view.shape == (3, data.channels, data.image_size, data.image_size)
        assert view.isfinite().all()
        assert view.std() > 0.1
    assert torch.equal(batch.labels, data.train.labels[batch.index])
    assert views == 1 or not torch.equal(*batch.views)


@pytest.mark.parametrize("name", ["sop", "inshop", "deepfashion2", "cars196"])
def test_photos_serve_both_modes_and_the_evaluation(tmp_path, name):
    data = load_data(official(name, tmp_path, 0.0005, photo()), workers=0)
    check_batches(data, "photo", views=2)
    check_batches(data, "supervised", views=1)
    for split in (data.test, data.gallery or data.test):
        first = next(eval_batches(split, data, batch_size=2))
        assert first.shape == (2, 3, 224, 224)
        assert first.std() > 0.1


def test_drawings_serve_both_modes_and_the_evaluation(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / f"{part}_c").mkdir(parents=True)
        drawing(0).save(tmp_path / part / f"{part}_c" / "0.png")
    for data in (load_data(f"omniglot:{tmp_path}", workers=0), load_data("digits-disjoint")):
        check_batches(data, data.augmentation, views=2)
        check_batches(data, "supervised", views=1)
        assert sum(map(len, eval_batches(data.test, data))) == len(data.test)
