"""Operations on batches of images, with separate parameters for each image.

The operations are deterministic and do not synchronize the host with the device:

* Crop, resize and flip are two matrix products, one for rows and one for columns. Their filter is the triangle of the
  antialiased resize of Pillow and torchvision. A Gaussian blur has the same form with another filter.
* Brightness, contrast, saturation, grayscale and normalization are affine maps of a pixel's color, x -> M x + b.
* A hue shift does not change the maximum and the minimum over a pixel's channels.

Axis legend: B images, C channels, H height, W width, S side of the result, N = S x S flattened pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in gray, as in torchvision and ITU-R 601."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

HUE_TENT = (3.0, 2.0, 4.0, 1.0, -1.0, -1.0, -1.0, 2.0, 2.0)
"""Centers c, signs s and offsets o of red, green and blue. The value at an angle a is s |a - c| + o, from 0 to 1."""


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Float[Tensor, "n"]:
    """Return the values as a cached tensor on the device, because a copy in each step would synchronize the host."""
    return torch.tensor(values, device=device)


@dataclass(frozen=True, eq=False)
class Crop:
    """A box for each image.

    Attributes:
        top: The upper edge in pixels.
        left: The left edge in pixels.
        height: The height in pixels.
        width: The width in pixels.
        flip: Whether to flip the cropped image horizontally.
    """

    top: Float[Tensor, "B"]
    left: Float[Tensor, "B"]
    height: Float[Tensor, "B"]
    width: Float[Tensor, "B"]
    flip: Bool[Tensor, "B"]


def crop_resize(images: Shaped[Tensor, "B C H W"], crop: Crop, size: int) -> Float[Tensor, "B C S S"]:
    """Crop, resize and flip each image.

    Equal to ``torchvision.transforms.functional.resized_crop(antialias=True)`` followed by ``hflip``.

    Args:
        images: The images. Those of dtype uint8 are divided by 255.
        crop: The boxes.
        size: The side S of the result in pixels.
    """
    B, C, H, W = images.shape
    starts, lengths = torch.stack([crop.top, crop.left]), torch.stack([crop.height, crop.width])
    flips = torch.stack([torch.zeros_like(crop.flip), crop.flip])
    rows, columns = _resize_matrices(starts, lengths, flips, max(H, W), size)
    if images.dtype == torch.uint8:
        columns.div_(255)
    wide = torch.bmm(images.float().view(B, C * H, W), columns[..., :W].transpose(1, 2))
    return rows[:, None, :, :H] @ wide.view(B, C, H, size)


def _resize_matrices(
    starts: Float[Tensor, "2 B"], lengths: Float[Tensor, "2 B"], flips: Bool[Tensor, "2 B"], side: int, size: int
) -> Float[Tensor, "2 B S side"]:
    """Return the weights of ``side`` source pixels in each of ``size`` output pixels, for rows and for columns.

    The output covers [start, start + length). Pixels outside of this range have weight 0, as if the image was cropped
    first. The triangle is two source pixels wide, or two output pixels if the image shrinks.
    """
    ratio, starts = (lengths / size)[..., None], starts[..., None]
    output = torch.arange(0.5, size, device=starts.device)
    pixel = torch.arange(0.5, side, device=starts.device)
    center = torch.addcmul(starts, ratio, torch.where(flips[..., None], size - output, output))
    inside = (pixel > starts) & (pixel < starts + lengths[..., None])
    weight = (pixel - center[..., None]).abs_().div_(-ratio.clamp(min=1)[..., None]).add_(1).clamp_(min=0)
    weight.mul_(inside[..., None, :])
    return weight.div_(weight.sum(-1, keepdim=True))


def gaussian_blur(images: Float[Tensor, "B C S S"], sigma: Float[Tensor, "B"]) -> Float[Tensor, "B C S S"]:
    """Blur each image with a Gaussian.

    The Gaussian is truncated at the edges of the image only, and its weights sum to 1.

    Args:
        images: The images.
        sigma: The standard deviation in pixels. A value below 0.05 does not change the image.
    """
    pixel = torch.arange(images.shape[-1], device=images.device, dtype=torch.float32)
    exponent = ((pixel - pixel[:, None]) / sigma[:, None, None]).square_() / -2
    weight = exponent.softmax(2)[:, None]
    return weight @ images @ weight.transpose(2, 3)


@dataclass(frozen=True, eq=False)
class Jitter:
    """Parameters of a color jitter.

    Attributes:
        factors: The factors of brightness, contrast and saturation. A factor of 1 has no effect.
        hue: The shift of the hue as a fraction of a full circle. A shift of 0 has no effect.
        order: ``order[i, j]`` is the j-th operation of image i: BRIGHTNESS, CONTRAST, SATURATION or HUE.
    """

    factors: Float[Tensor, "B 3"]
    hue: Float[Tensor, "B"]
    order: Int64[Tensor, "B 4"]


def color_jitter(images: Float[Tensor, "B 3 N"], jitter: Jitter) -> Float[Tensor, "B 3 N"]:
    """Change brightness, contrast, saturation and hue, in a separate order for each image.

    Each image passes three blends, a hue shift and three more blends. A blend that belongs on the other side of the hue
    shift has factor 1. Six cheap blends and one hue shift thus implement all 24 orders in one batch.

    Args:
        images: Pixels in [0, 1].
        jitter: The parameters.
    """
    factors = F.pad(jitter.factors, (0, 1), value=1.0).gather(1, jitter.order)
    before = (jitter.order == HUE).cumsum(1) == 0
    active = torch.cat([before[:, :3], ~before[:, 1:]], 1)
    factors = torch.where(active, torch.cat([factors[:, :3], factors[:, 1:]], 1), 1.0)
    pixel_maps, mean_maps = _blend_maps(factors, torch.cat([jitter.order[:, :3], jitter.order[:, 1:]], 1))
    for i in range(6):
        if i == 3:
            images = shift_hue(images, jitter.hue)
        offset = torch.bmm(mean_maps[:, i], images.mean(2, keepdim=True))
        images = torch.bmm(pixel_maps[:, i], images).add_(offset).clamp_(0, 1)
    return images


def _blend_maps(
    factors: Float[Tensor, "B n"], operations: Int64[Tensor, "B n"]
) -> tuple[Float[Tensor, "B n 3 3"], Float[Tensor, "B n 1 3"]]:
    """Return ``factor x + (1 - factor) reference`` as a map of the pixel's color and a map of the image's mean color.

    The reference is black for brightness, the image's mean gray for contrast and the pixel's gray for saturation.
    """
    luma = constant(LUMA, factors.device)
    keep, rest = factors[..., None, None], (1 - factors)[..., None, None]
    pixel = keep * torch.eye(3, device=factors.device) + rest * (operations == SATURATION)[..., None, None] * luma
    return pixel, rest * (operations == CONTRAST)[..., None, None] * luma


def shift_hue(images: Float[Tensor, "B 3 N"], hue: Float[Tensor, "B"]) -> Float[Tensor, "B 3 N"]:
    """Shift the hue, as ``torchvision.transforms.functional.adjust_hue`` does.

    Args:
        images: Pixels in [0, 1].
        hue: The shift as a fraction of a full circle.
    """
    low = images.amin(1, keepdim=True)
    chroma = images.amax(1, keepdim=True).sub_(low)
    r, g, b = (images - low).div_(chroma.clamp(min=1e-12)).unbind(1)
    # The maximum channel is exactly 1, so its floor is 1. The angle is in sixths of a circle.
    angle = torch.lerp(torch.lerp(r - g + 4, b - r + 2, g.floor()), g - b, r.floor())
    angle = angle.div_(6).add_(hue[:, None])
    angle = angle.sub_(angle.floor()).mul_(6)
    center, sign, offset = constant(HUE_TENT, images.device).view(3, 3, 1)
    return (angle[:, None] - center).abs_().mul_(sign).add_(offset).clamp_(0, 1).mul_(chroma).add_(low)


def gray_and_normalize(
    images: Float[Tensor, "B 3 N"], gray: Bool[Tensor, "B"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "B 3 N"]:
    """Convert some of the images to gray and normalize all of them, in one affine map.

    Args:
        images: Pixels in [0, 1].
        gray: Whether to convert the image to gray.
        mean: The mean of each channel.
        std: The standard deviation of each channel.
    """
    device = images.device
    deviation = constant(std, device)[:, None]
    color = torch.where(gray[:, None, None], constant(LUMA, device).expand(3, 3), torch.eye(3, device=device))
    return torch.bmm(color / deviation, images).sub_(constant(mean, device)[:, None] / deviation)


def normalize(
    images: Float[Tensor, "B C S S"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "B C S S"]:
    """Return (x - mean) / std for each channel.

    Args:
        images: The images.
        mean: The mean of each channel.
        std: The standard deviation of each channel.
    """
    center, deviation = constant(mean, images.device), constant(std, images.device)
    return (images - center[:, None, None]) / deviation[:, None, None]
