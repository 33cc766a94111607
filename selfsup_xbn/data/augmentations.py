"""Random views of batches of images in memory, computed on the device of the images.

A family of views is a deterministic function of the images and of a matrix of uniform random numbers with one row per
view. Each view has independent random parameters.

Axis legend: B views, C channels, H height, W width, S side of a view, P uniform numbers per view.
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
    constant,
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
"""Maximum aspect ratio of a box. The minimum is 1 / ASPECT."""


def random_crop(
    uniform: Float[Tensor, "B P"], height: int, width: int, scale: tuple[float, float], flip: float
) -> Crop:
    """Return random boxes like those of torchvision's ``RandomResizedCrop``.

    A box is the first of ten random boxes that fits into the image. If none fits, as in a very long image, it is the
    largest box of an allowed aspect ratio, at a random position; torchvision returns a central box.

    Args:
        uniform: ``CROP_NUMBERS`` numbers in [0, 1) per view.
        height: The height H of the images in pixels.
        width: The width W of the images in pixels.
        scale: The minimum and maximum area of a box, as a fraction of the area of the image.
        flip: The probability of a horizontal flip.

    Example:
        >>> crop = random_crop(torch.rand(5, CROP_NUMBERS), 32, 32, (0.2, 1.0), 0.5)
        >>> bool((crop.left + crop.width <= 32).all())
        True
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[:, :TRIES])
    aspect = torch.exp((2 * uniform[:, TRIES : 2 * TRIES] - 1) * math.log(ASPECT))
    sides = torch.stack([area / aspect, area * aspect]).sqrt_().round_()  # heights, then widths
    limits = constant((float(height), float(width)), uniform.device)[:, None]
    fits = ((sides >= 1) & (sides <= limits[:, None])).all(0)
    first = torch.where(fits, torch.arange(TRIES, device=fits.device), TRIES).amin(1, keepdim=True)
    largest = float(min(height, round(width * ASPECT))), float(min(width, round(height * ASPECT)))
    otherwise = constant(largest, uniform.device)[:, None, None].expand(-1, len(uniform), 1)
    lengths = torch.cat([sides, otherwise], 2).gather(2, first.expand(2, -1, 1))[:, :, 0]
    top, left = (uniform[:, 2 * TRIES : -1].T * (limits - lengths + 1)).floor()
    return Crop(top, left, lengths[0], lengths[1], uniform[:, -1] < flip)


def random_jitter(
    uniform: Float[Tensor, "B P"], strength: tuple[float, float, float, float], probability: float
) -> Jitter:
    """Return random parameters like those of torchvision's ``ColorJitter``.

    Args:
        uniform: ``JITTER_NUMBERS`` numbers in [0, 1) per view.
        strength: The strength s of brightness, contrast, saturation and hue. The factors of the first three are in
            [1 - s, 1 + s], and the shift of the hue is in [-s, s].
        probability: The probability that a view is jittered. The other views get parameters without effect.

    Example:
        >>> random_jitter(torch.rand(5, JITTER_NUMBERS), (0.4, 0.4, 0.4, 0.1), probability=0.0).factors.unique()
        tensor([1.])
    """
    applied = uniform[:, :1] < probability
    changes = (2 * uniform[:, 1:5] - 1) * constant(strength, uniform.device) * applied
    return Jitter(1 + changes[:, :3], changes[:, 3], uniform[:, 5:].argsort(1))


@dataclass(frozen=True)
class PlainViews:
    """Return the evaluation views, without randomness.

    Args:
        size: The side S of a view in pixels.
        mean: The mean of each channel.
        std: The standard deviation of each channel.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    numbers: ClassVar[int] = 0

    def __call__(self, images: UInt8[Tensor, "B C H W"], uniform: Float[Tensor, "B 0"]) -> Float[Tensor, "B C S S"]:
        """Return one view of each image."""
        return normalize(fit(images.float() / 255, self.size), self.mean, self.std)


@dataclass(frozen=True)
class CropViews:
    """Crop and flip the images, for supervised learning.

    Args:
        size: The side S of a view in pixels.
        mean: The mean of each channel.
        std: The standard deviation of each channel.
        scale: The minimum and maximum area of a crop, as a fraction of the area of the image.
        flip: The probability of a horizontal flip.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    numbers: ClassVar[int] = CROP_NUMBERS

    def __call__(self, images: UInt8[Tensor, "B C H W"], uniform: Float[Tensor, "B P"]) -> Float[Tensor, "B C S S"]:
        """Return one view of each image, given ``numbers`` uniform random numbers in [0, 1) per view."""
        crop = random_crop(uniform, images.shape[2], images.shape[3], self.scale, self.flip)
        return normalize(crop_resize(images, crop, self.size), self.mean, self.std)


@dataclass(frozen=True)
class ColorViews:
    """Crop, flip, jitter, gray and blur color images, for contrastive learning.

    Without blur the views are those of the MoCo notebook for CIFAR-10; with blur they are those of MoCo v2 (Chen et
    al., "Improved Baselines with Momentum Contrastive Learning", 2020).

    Args:
        size: The side S of a view in pixels.
        mean: The mean of each channel.
        std: The standard deviation of each channel.
        scale: The minimum and maximum area of a crop, as a fraction of the area of the image.
        flip: The probability of a horizontal flip.
        jitter: The strength of brightness, contrast, saturation and hue, as in ``random_jitter``.
        jitter_probability: The probability of a color jitter.
        gray: The probability of a conversion to gray.
        blur: The probability of a Gaussian blur with a standard deviation of 0.1 to 2 pixels.
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
        """Return one view of each image, given ``numbers`` uniform random numbers in [0, 1) per view."""
        for_crop, for_jitter, rest = uniform.split([CROP_NUMBERS, JITTER_NUMBERS, 3], 1)
        crop = random_crop(for_crop, images.shape[2], images.shape[3], self.scale, self.flip)
        pixels = crop_resize(images, crop, self.size).flatten(2)
        pixels = color_jitter(pixels, random_jitter(for_jitter, self.jitter, self.jitter_probability))
        pixels = gray_and_normalize(pixels, rest[:, 0] < self.gray, self.mean, self.std)
        views = pixels.view(len(images), 3, self.size, self.size)
        if not self.blur:
            return views
        # The blur commutes with the normalization because its weights sum to 1.
        return gaussian_blur(views, torch.where(rest[:, 1] < self.blur, 0.1 + 1.9 * rest[:, 2], 0.01))


@dataclass(frozen=True)
class AffineViews:
    """Rotate, shear, scale and shift the images on a black background, for digits and drawings.

    Args:
        size: The side S of a view in pixels.
        mean: The mean of each channel.
        std: The standard deviation of each channel.
        degrees: The maximum angle of rotation and the maximum angle of shear, in either direction.
        zoom: The minimum and maximum scale.
        shift: The maximum shift in either direction, as a fraction of the side.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    degrees: float = 25.0
    zoom: tuple[float, float] = (0.6, 1.4)
    shift: float = 0.1
    numbers: ClassVar[int] = 5

    def __call__(self, images: UInt8[Tensor, "B C H W"], uniform: Float[Tensor, "B P"]) -> Float[Tensor, "B C S S"]:
        """Return one view of each image, given ``numbers`` uniform random numbers in [0, 1) per view."""
        shape = [len(images), images.shape[1], self.size, self.size]
        grid = F.affine_grid(self.matrix(uniform), shape, align_corners=False)
        return normalize(F.grid_sample(images.float() / 255, grid, align_corners=False), self.mean, self.std)

    def matrix(self, uniform: Float[Tensor, "B P"]) -> Float[Tensor, "B 2 3"]:
        """Return the affine maps from the pixels of a view to those of the image, in coordinates from -1 to 1.

        The linear part is rotation x shear / scale.
        """
        signed = 2 * uniform - 1
        angle, shear = (signed[:, :2] * math.radians(self.degrees)).unbind(1)
        x, y = (signed[:, 2:4] * 2 * self.shift).unbind(1)
        zoom = self.zoom[0] + (self.zoom[1] - self.zoom[0]) * uniform[:, 4]
        cos, sin, slant = angle.cos() / zoom, angle.sin() / zoom, shear.tan()
        return torch.stack([cos, cos * slant - sin, x, sin, sin * slant + cos, y], 1).view(-1, 2, 3)


Views = PlainViews | CropViews | ColorViews | AffineViews
"""A family of views. Its ``numbers`` is the number P of uniform random numbers in [0, 1) per view."""


def memory_views(name: str, data: ImageData) -> Views:
    """Return a family of views for images in memory.

    - ``"digits"`` rotates, shears, scales and shifts, for contrastive learning on gray drawings.
    - ``"cifar"`` is the family of MoCo, and ``"photo"`` is the same with blur.
    - ``"supervised"`` crops and flips color images. Gray images, which may show letters, are not flipped but get a
      weaker form of ``"digits"``.
    - ``"none"`` is the evaluation view.

    Args:
        name: The name of the family.
        data: The data set, with the side and the normalization of the views.

    Raises:
        UserError: If the family does not exist, or needs color and the images are gray.

    Example:
        >>> from selfsup_xbn.data import load_data
        >>> memory_views("digits", load_data("digits")).numbers
        5
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
            f"augmentation {name!r} needs color images, but the images of {data.name} are gray; "
            "choose digits or supervised"
        )
    return families[name]
