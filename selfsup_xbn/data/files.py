"""Functions from an image file to tensors, for worker processes: random views, evaluation view and thumbnail.

Axis legend: V views, C channels, S and s sides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms import functional as TF

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.data.images import read_image, to_bytes
from selfsup_xbn.data.sampler import seed_for
from selfsup_xbn.data.workers import failures
from selfsup_xbn.errors import UserError

MAX_ASPECT_RATIO = 16
"""Maximum ratio of the longer to the shorter side of an image that is resized. Longer images are cropped first."""

Key = tuple[int, int, int, int]
Pixels = TypeVar("Pixels", Image.Image, Tensor)


def _read(split: Split, sample: int) -> Image.Image:
    assert split.paths is not None
    return read_image(split.paths[sample], None if split.boxes is None else split.boxes[sample].tolist())


def broken_files(data: ImageData, workers: int) -> dict[str, str]:
    """Decode all images that are read from files, and return the message of the error by the path of each broken file.

    Args:
        data: The data set. Images in memory were decoded when it was loaded.
        workers: The number of processes that read files.
    """
    broken: dict[str, str] = {}
    for split in (data.train, data.validation, data.test, data.gallery):
        if split is not None and split.paths is not None:
            messages = failures(partial(_read, split), len(split), workers)
            broken |= {split.paths[sample]: message for sample, message in messages.items()}
    return broken


class RandomFile:
    """Return random views of a file as bytes, which ``FileViews`` normalizes on the device.

    The seed of a view is a function of ``seed``, the epoch, the step, the position in the batch and the view's number.

    Args:
        split: The samples, with paths.
        augmentation: The family of views, as in ``file_transform``.
        data: The side of the views.
        seed: The seed of the run.
        views: The number of views per sample.

    Raises:
        UserError: If the family does not exist.
    """

    def __init__(self, split: Split, augmentation: str, data: ImageData, seed: int, views: int) -> None:
        self.split, self.seed, self.views = split, seed, views
        self.transform = file_transform(augmentation, data)

    def __call__(self, key: Key) -> list[Tensor]:
        """Return the views for a key (sample, epoch, step, position in the batch).

        Returns:
            The pixels, of shape [V, 3, S, S], and in families with erased boxes their rows and columns, of shape
            [V, 2, S].
        """
        image = _read(self.split, key[0])
        pixels, erased = zip(*(self._view(image, key, view) for view in range(self.views)), strict=True)
        return [torch.stack(tensors) for tensors in (pixels, erased) if tensors[0] is not None]

    def _view(self, image: Image.Image, key: Key, view: int) -> tuple[Tensor, Tensor | None]:
        with seeded(seed_for(self.seed, *key[1:], view)):
            return self.transform(image)


def fit(image: Pixels, size: int) -> Pixels:
    """Resize the shorter side to S / 0.875 and crop the central S x S pixels, as torchvision and timm do.

    A square image of side S is returned unchanged. The ends of a very long image, which the crop would remove, are
    removed before the resizing: a file of 100 bytes may contain 1 x 65,000 pixels, which would need too much memory
    once they are resized.

    Args:
        image: A PIL image, or a tensor of shape [..., H, W].
        size: The side S of the result in pixels.
    """
    width, height = TF.get_image_size(image)
    if width == height == size:
        return image
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        image = TF.center_crop(image, [min(height, MAX_ASPECT_RATIO * width), min(width, MAX_ASPECT_RATIO * height)])
    return TF.center_crop(TF.resize(image, [round(size / 0.875)], antialias=True), [size, size])


class EvalFile:
    """Return the evaluation view of a file: the whole image or box, resized and cropped by ``fit``.

    Args:
        split: The samples, with paths.
        size: The side S of the view in pixels.
    """

    def __init__(self, split: Split, size: int) -> None:
        self.split, self.size = split, size

    def __call__(self, sample: int) -> UInt8[Tensor, "C S S"]:
        """Return the view of a sample."""
        return to_bytes(fit(_read(self.split, sample), self.size))


class SmallFile:
    """Return the whole image or box, resized to a square without regard to its aspect ratio.

    Args:
        split: The samples, with paths.
        side: The side of the square in pixels.
    """

    def __init__(self, split: Split, side: int) -> None:
        self.split, self.side = split, side

    def __call__(self, sample: int) -> UInt8[Tensor, "C s s"]:
        """Return the thumbnail of a sample."""
        return to_bytes(_read(self.split, sample).resize((self.side, self.side), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class FileTransform:
    """A random transform from an RGB image to the bytes of a view.

    Args:
        augment: The transform of the image.
        erase: A function that sets a random box of a bool tensor [1, S, S] to False, e.g. timm's ``RandomErasing``.
    """

    augment: Callable[[Image.Image], Image.Image]
    erase: Callable[[Tensor], Tensor] | None = None

    def __call__(self, image: Image.Image) -> tuple[UInt8[Tensor, "C S S"], Bool[Tensor, "2 S"] | None]:
        """Return the pixels, and which rows and which columns are those of the box, or ``None`` without ``erase``.

        The box is to be set to 0 after the normalization, where 0 is the mean color.
        """
        pixels = to_bytes(self.augment(image))
        if self.erase is None:
            return pixels, None
        kept = self.erase(torch.ones(1, *pixels.shape[1:], dtype=torch.bool))[0]
        return pixels, torch.stack([~kept.all(1), ~kept.all(0)])


def file_transform(name: str, data: ImageData) -> FileTransform:
    """Return the random transform of a family of views, for image files.

    Args:
        name: The family. ``"photo"`` is lightly's MoCo v2 transform, ``"cifar"`` the same without blur,
            ``"supervised"`` timm's RandAugment (rand-m9-mstd0.5) with random erasing of probability 0.2, and
            ``"none"`` the evaluation view. The conversion to floating point, the normalization and the erasing, which
            are the last steps of these transforms, are left to ``float_views`` of ``file_views.py``.
        data: The side of the views, and the mean color, with which RandAugment fills empty corners.

    Raises:
        UserError: If the family does not exist.
    """
    if name in ("photo", "cifar"):
        from lightly.transforms import MoCoV2Transform

        blur = 0.5 if name == "photo" else 0.0
        views = MoCoV2Transform(data.image_size, gaussian_blur=blur, normalize=None).transforms
        *augment, _ = views[0].transform.transforms  # the last one is ToTensor
        return FileTransform(Compose(augment))
    if name == "supervised":
        from timm.data import create_transform

        whole = create_transform(
            data.image_size, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.2, mean=data.mean
        )
        *augment, _, _, erase = whole.transforms  # the last ones are ToTensor, Normalize and RandomErasing
        return FileTransform(Compose(augment), erase)
    if name == "none":
        return FileTransform(partial(fit, size=data.image_size))
    raise UserError(f"unknown augmentation {name!r} for image files; choose from photo, cifar, supervised, none")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of torch, NumPy and Python within the context, and restore them on exit.

    The transforms draw from all three generators. The generators of the GPUs do not change, as they would with
    ``torch.manual_seed``.
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
