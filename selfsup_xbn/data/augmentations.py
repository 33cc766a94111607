"""Random views of a batch of in-memory images, on their device, with parameters drawn anew for every view.

A family of views is a function of the images and of a matrix of uniform random numbers, one row a view: all that is
random is in that matrix.

Axis legend: B views, C channels, H, W the image's sides, S the view's side, P uniform numbers a view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from selfsup_xbn.data.base import ImageData
from selfsup_xbn.data.files import fit
from selfsup_xbn.data.image_ops import (
    Crop,
    Jitter,
    color_jitter,
    crop_resize,
    gaussian_blur,
    gray_and_normalize,
    normalize,
)
from selfsup_xbn.errors import UserError

TRIES = 10
CROP_NUMBERS = 2 * TRIES + 3
JITTER_NUMBERS = 9
ASPECT = 4 / 3
"""Boxes are between 1 / ASPECT and ASPECT times as wide as high."""


def random_crop(
    uniform: Float[Tensor, "B P"], height: int, width: int, scale: tuple[float, float], flip: float
) -> Crop:
    """Torchvision's ``RandomResizedCrop``: the first of ten random boxes that fits into the image.

    Where none fits (a very long image) it is the largest box of an allowed aspect, at random, not in the middle.

    Args:
        uniform: ``CROP_NUMBERS`` numbers in [0, 1) a view.
        scale: smallest and largest share of the image's area.
        flip: probability of a flip.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[:, :TRIES])
    aspect = torch.exp((2 * uniform[:, TRIES : 2 * TRIES] - 1) * math.log(ASPECT))
    heights, widths = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (heights >= 1) & (widths >= 1) & (heights <= height) & (widths <= width)
    first = torch.where(fits, torch.arange(TRIES, device=fits.device), TRIES).amin(1, keepdim=True)
    h = F.pad(heights, (0, 1), value=min(height, round(width * ASPECT))).gather(1, first)[:, 0]
    w = F.pad(widths, (0, 1), value=min(width, round(height * ASPECT))).gather(1, first)[:, 0]
    row, column, mirror = uniform[:, 2 * TRIES :].unbind(1)
    return Crop((row * (height - h + 1)).floor(), (column * (width - w + 1)).floor(), h, w, mirror < flip)


def random_jitter(
    uniform: Float[Tensor, "B P"], strength: tuple[float, float, float, float], probability: float
) -> Jitter:
    """Torchvision's ``ColorJitter``, applied with ``probability``; where it is not, its parameters change nothing.

    Args:
        uniform: ``JITTER_NUMBERS`` numbers in [0, 1) a view.
        strength: of brightness, contrast, saturation and hue; factors lie in 1 +- strength, the hue in 0 +- strength.
    """
    applied = uniform[:, 0] < probability
    brightness, contrast, saturation, hue = (
        (2 * number - 1) * limit * applied for number, limit in zip(uniform[:, 1:5].unbind(1), strength, strict=True)
    )
    return Jitter(1 + torch.stack([brightness, contrast, saturation], 1), hue, uniform[:, 5:].argsort(1))


@dataclass(frozen=True)
class PlainViews:
    """The image as an evaluation sees it: nothing is random."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    numbers: ClassVar[int] = 0

    def __call__(self, images: UInt8[Tensor, "B C H W"], uniform: Float[Tensor, "B 0"]) -> Float[Tensor, "B C S S"]:
        return normalize(fit(images.float() / 255, self.size), self.mean, self.std)


@dataclass(frozen=True)
class CropViews:
    """Crop, flip: light views for supervised learning."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    numbers: ClassVar[int] = CROP_NUMBERS

    def __call__(self, images: UInt8[Tensor, "B C H W"], uniform: Float[Tensor, "B P"]) -> Float[Tensor, "B C S S"]:
        crop = random_crop(uniform, images.shape[2], images.shape[3], self.scale, self.flip)
        return normalize(crop_resize(images, crop, self.size), self.mean, self.std)


@dataclass(frozen=True)
class ColorViews:
    """Crop, flip, colour jitter, greyscale: the views of the MoCo notebook for CIFAR-10; with blur, those of MoCo v2.

    Args:
        blur: probability of a Gaussian blur with a standard deviation of 0.1 to 2 pixels.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    gray: float = 0.2
    blur: float = 0.0
    numbers: ClassVar[int] = CROP_NUMBERS + JITTER_NUMBERS + 3

    def __call__(self, images: UInt8[Tensor, "B 3 H W"], uniform: Float[Tensor, "B P"]) -> Float[Tensor, "B 3 S S"]:
        for_crop, for_jitter, rest = uniform.split([CROP_NUMBERS, JITTER_NUMBERS, 3], 1)
        crop = random_crop(for_crop, images.shape[2], images.shape[3], self.scale, self.flip)
        pixels = crop_resize(images, crop, self.size).flatten(2)
        pixels = color_jitter(pixels, random_jitter(for_jitter, self.jitter, self.jitter_probability))
        pixels = gray_and_normalize(pixels, rest[:, 0] < self.gray, self.mean, self.std)
        views = pixels.view(len(images), 3, self.size, self.size)
        if not self.blur:
            return views
        # The blur's weights sum to 1, so it may come after the normalisation.
        return gaussian_blur(views, torch.where(rest[:, 1] < self.blur, 0.1 + 1.9 * rest[:, 2], 0.01))


@dataclass(frozen=True)
class AffineViews:
    """Rotations, shears, scalings and shifts on a black ground, no flip: for digits and drawings.

    Args:
        degrees: largest rotation and largest shear to either side.
        zoom: smallest and largest scale.
        shift: largest shift to either side, as a share of the side.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    degrees: float = 25.0
    zoom: tuple[float, float] = (0.6, 1.4)
    shift: float = 0.1
    numbers: ClassVar[int] = 5

    def __call__(self, images: UInt8[Tensor, "B C H W"], uniform: Float[Tensor, "B P"]) -> Float[Tensor, "B C S S"]:
        shape = [len(images), images.shape[1], self.size, self.size]
        grid = F.affine_grid(self.matrix(uniform), shape, align_corners=False)
        return normalize(F.grid_sample(images.float() / 255, grid, align_corners=False), self.mean, self.std)

    def matrix(self, uniform: Float[Tensor, "B P"]) -> Float[Tensor, "B 2 3"]:
        """Where a view's pixels come from, in coordinates from -1 to 1: rotation x shear / scale, then the shift."""
        signed = 2 * uniform - 1
        angle, shear = (signed[:, :2] * math.radians(self.degrees)).unbind(1)
        x, y = (signed[:, 2:4] * 2 * self.shift).unbind(1)
        zoom = self.zoom[0] + (self.zoom[1] - self.zoom[0]) * uniform[:, 4]
        cos, sin, slant = angle.cos() / zoom, angle.sin() / zoom, shear.tan()
        return torch.stack([cos, cos * slant - sin, x, sin, sin * slant + cos, y], 1).view(-1, 2, 3)


Views = PlainViews | CropViews | ColorViews | AffineViews
"""A family: ``numbers`` uniform random numbers in [0, 1) decide one view."""


def memory_views(name: str, data: ImageData) -> Views:
    """The family ``name`` for images in memory.

    - "digits": rotated, sheared, scaled and shifted, for contrastive learning on grey drawings.
    - "cifar": MoCo's views; "photo": the same with blur.
    - "supervised": light views that keep the class plain; crop and flip in colour; in grey a gentler "digits", for
      letters must not be mirrored.
    - "none": the image as it is.

    Raises:
        UserError: no such family, or one that works on colours and images that have none.
    """
    size, mean, std = data.image_size, data.mean, data.std
    light = AffineViews(size, mean, std, degrees=10.0, zoom=(0.85, 1.15), shift=0.05)
    families: dict[str, Views] = {
        "digits": AffineViews(size, mean, std),
        "cifar": ColorViews(size, mean, std),
        "photo": ColorViews(size, mean, std, blur=0.5),
        "supervised": CropViews(size, mean, std) if data.channels == 3 else light,
        "none": PlainViews(size, mean, std),
    }
    if name not in families:
        raise UserError(f"unknown augmentation {name!r} for images in memory; choose from {', '.join(families)}")
    if isinstance(families[name], ColorViews) and data.channels != 3:
        raise UserError(
            f"augmentation {name!r} needs colour images, but the images of {data.name} are grey; "
            "choose digits or supervised"
        )
    return families[name]
