"""Views of image files: their values, the bytes that the workers return, and the order of their copies to a GPU."""

from __future__ import annotations

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from lightly.transforms import MoCoV2Transform
from timm.data import create_transform
from torchvision.transforms import Compose, Normalize, ToTensor

from selfsup_xbn.data import Batches, ImageData, RandomBatches, load_data, seed_for
from selfsup_xbn.data.file_views import float_views
from selfsup_xbn.data.files import RandomFile, fit, seeded
from selfsup_xbn.data.images import read_image
from selfsup_xbn.data.prefetch import on_device

FAMILIES = ["photo", "cifar", "supervised", "none"]


@pytest.fixture
def files(tree) -> ImageData:
    sizes = [(24 + i, 40 - i) for i in range(12)]
    return load_data(f"folder:{tree(train={'ant': sizes, 'bee': sizes})}")


def library_transform(family: str, data: ImageData):
    """Return the transform of the library with its own conversion to floating point, normalization and erasing."""
    size, mean, std = data.image_size, list(data.mean), list(data.std)
    if family in ("photo", "cifar"):
        blur = 0.5 if family == "photo" else 0.0
        return MoCoV2Transform(size, gaussian_blur=blur, normalize={"mean": mean, "std": std}).transforms[0]
    if family == "supervised":
        options = {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.2, "mean": data.mean, "std": data.std}
        return create_transform(size, is_training=True, **options)
    return Compose([partial(fit, size=size), ToTensor(), Normalize(mean, std)])


@pytest.mark.parametrize("family", FAMILIES)
def test_views_are_those_of_the_library(files, family):
    """Bit for bit, but for lightly's: it multiplies the bytes by 1 / 255, which rounds otherwise than a division."""
    tolerance = 1e-6 if family in ("photo", "cifar") else 0
    sampler = RandomBatches(len(files.train), 12)
    transform, erased = library_transform(family, files), 0
    for epoch in range(2):
        loader = Batches(files.train, family, data=files, views=2, sampler=sampler, seed=7)
        for step, batch in enumerate(loader.epoch(epoch)):
            for number, views in enumerate(batch.views):
                assert views.is_contiguous()
                for position, (sample, view) in enumerate(zip(batch.index.tolist(), views, strict=True)):
                    image = read_image(files.train.paths[sample])  # checks of types draw random numbers
                    with seeded(seed_for(7, epoch, step, position, number)):
                        expected = transform(image)
                    torch.testing.assert_close(view, expected.as_subclass(torch.Tensor), rtol=0, atol=tolerance)
                    erased += int((expected == 0).all(0).sum() > 5)
    assert (erased > 0) == (family == "supervised")


@pytest.mark.parametrize("family", FAMILIES)
def test_workers_return_a_byte_per_value(files, family):
    tensors = RandomFile(files.train, family, files, seed=0, views=2)((0, 0, 0, 0))
    side = files.image_size
    erased = 2 * side if family == "supervised" else 0
    assert sum(tensor.nbytes for tensor in tensors) == 2 * (3 * side**2 + erased)


def test_erased_boxes_of_a_batch_are_zero():
    pixels = torch.randint(1, 256, (3, 2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    erased = torch.zeros(3, 2, 2, 8, dtype=torch.bool)
    erased[1, 0, 0, 2:5] = erased[1, 0, 1, 6:] = True  # a box of 3 x 2 pixels
    erased[2, 1, 0, 4:] = True  # rows without columns
    views = float_views(pixels, erased, mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = (pixels / 255).unbind(1)
    expected[0][1, :, 2:5, 6:] = 0
    assert all(torch.equal(view, other) for view, other in zip(views, expected, strict=True))


class Recorded(torch.Tensor):
    """A tensor that records its copies in place of performing them."""

    log: list[str]
    streams: list[str]
    label: str

    def pin_memory(self):
        self.log.append(f"pin {self.label}")
        return self

    def to(self, device, *, non_blocking):
        assert (device.type, non_blocking) == ("cuda", True)
        self.log.append(f"copy {self.label} on {self.streams[-1]}")
        return self

    def record_stream(self, stream):
        self.log.append(f"{stream.label} uses {self.label}")


def test_copies_run_a_batch_ahead_on_another_stream(monkeypatch):
    log, streams = [], ["compute"]

    def recorded(number: int) -> Recorded:
        log.append(f"read {number}")
        tensor = torch.zeros(1).as_subclass(Recorded)
        tensor.log, tensor.streams, tensor.label = log, streams, f"{number}"
        return tensor

    class Context:
        def __enter__(self):
            streams.append("copies")

        def __exit__(self, *_):
            streams.pop()

    events = [Mock(torch.cuda.Event, label=f"{number}") for number in range(3)]
    copies = Mock(torch.cuda.Stream, **{"record_event.side_effect": events})
    compute = Mock(torch.cuda.Stream, label="compute")
    compute.wait_event.side_effect = lambda event: log.append(f"compute waits for {event.label}")
    monkeypatch.setattr("selfsup_xbn.data.prefetch._copy_stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "stream", {copies: Context()}.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    for number, _ in enumerate(on_device(([recorded(i)] for i in range(3)), torch.device("cuda"))):
        log.append(f"step {number}")
    before = [[f"read {n}", f"pin {n}", f"copy {n} on copies"] for n in range(3)]
    use = [[f"compute waits for {n}", f"compute uses {n}", f"step {n}"] for n in range(3)]
    assert log == [*before[0], *before[1], *use[0], *before[2], *use[1], *use[2]]
    for mock in (copies, compute, *events):
        assert not mock.synchronize.called
        assert not mock.query.called


def test_on_a_cpu_a_batch_is_read_when_it_is_requested(monkeypatch):
    monkeypatch.delattr(torch.cuda, "Stream")
    monkeypatch.delattr(torch.cuda, "stream")
    read = []
    batches = ([torch.full((1,), read.append(n) or n)] for n in range(3))
    for n, [tensor] in enumerate(on_device(batches, torch.device("cpu"))):
        assert tensor.item() == n
        assert read == list(range(n + 1))
