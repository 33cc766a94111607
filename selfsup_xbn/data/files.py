"""What a worker process makes of one image file: random views, the evaluation's view, or a thumbnail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms import functional as TF

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.data.images import read_image, to_bytes
from selfsup_xbn.data.sampler import seed_for
from selfsup_xbn.errors import UserError

LONGEST = 16
"""Times as long as wide an image may be before it is resized."""

Key = tuple[int, int, int, int]
Pixels = TypeVar("Pixels", Image.Image, Tensor)


def _read(split: Split, sample: int) -> Image.Image:
    assert split.paths is not None
    return read_image(split.paths[sample], None if split.boxes is None else split.boxes[sample].tolist())


class RandomFile:
    """Random views of a file. The key (sample, epoch, step, place) and the view's number seed every view anew."""

    def __init__(self, split: Split, augmentation: str, data: ImageData, seed: int, views: int) -> None:
        self.split, self.seed, self.views = split, seed, views
        self.transform = file_transform(augmentation, data)

    def __call__(self, key: Key) -> tuple[Float[Tensor, "C S S"], ...]:
        image = _read(self.split, key[0])
        return tuple(self._view(image, key, view) for view in range(self.views))

    def _view(self, image: Image.Image, key: Key, view: int) -> Float[Tensor, "C S S"]:
        with seeded(seed_for(self.seed, *key[1:], view)):
            return self.transform(image)


def fit(image: Pixels, size: int) -> Pixels:
    """The middle S x S pixels after the shorter side is resized to S / 0.875, torchvision's and timm's convention.

    A square image of side S stays as it is. Of a very long one the ends, which are not seen, are cut off first: a file
    of 100 bytes may hold 1 x 65,000 pixels, and resized these would fill any memory.
    """
    width, height = TF.get_image_size(image)
    if width == height == size:
        return image
    if max(width, height) > LONGEST * min(width, height):
        image = TF.center_crop(image, [min(height, LONGEST * width), min(width, LONGEST * height)])
    return TF.center_crop(TF.resize(image, [round(size / 0.875)], antialias=True), [size, size])


class EvalFile:
    """The image as an evaluation sees it."""

    def __init__(self, split: Split, size: int) -> None:
        self.split, self.size = split, size

    def __call__(self, sample: int) -> UInt8[Tensor, "C S S"]:
        return to_bytes(fit(_read(self.split, sample), self.size))


class SmallFile:
    """The whole image, squeezed into a square of ``side``."""

    def __init__(self, split: Split, side: int) -> None:
        self.split, self.side = split, side

    def __call__(self, sample: int) -> UInt8[Tensor, "C s s"]:
        return to_bytes(_read(self.split, sample).resize((self.side, self.side), Image.Resampling.BILINEAR))


def file_transform(name: str, data: ImageData) -> Callable[[Image.Image], Tensor]:
    """The family ``name`` for files: lightly's MoCo v2 views ("photo"; "cifar" has no blur) or timm's RandAugment
    ("supervised": rand-m9-mstd0.5, random erasing 0.2); "none" is the evaluation's view.

    Raises:
        UserError: no such family.
    """
    if name in ("photo", "cifar"):
        from lightly.transforms import MoCoV2Transform

        statistics = {"mean": list(data.mean), "std": list(data.std)}
        blur = 0.5 if name == "photo" else 0.0
        return MoCoV2Transform(data.image_size, gaussian_blur=blur, normalize=statistics).transforms[0]
    if name == "supervised":
        from timm.data import create_transform

        return create_transform(
            data.image_size,
            is_training=True,
            auto_augment="rand-m9-mstd0.5",
            re_prob=0.2,
            mean=data.mean,
            std=data.std,
        )
    if name == "none":
        return Compose([partial(fit, size=data.image_size), ToTensor(), Normalize(data.mean, data.std)])
    raise UserError(f"unknown augmentation {name!r} for image files; choose from photo, cifar, supervised, none")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, the CPU's global random states of torch, NumPy and Python start from ``seed``; afterwards they are back.

    The transforms draw from all three. The GPU's states are left alone (``torch.manual_seed`` would reseed them).
    """
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
