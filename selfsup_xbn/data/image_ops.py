"""What can be done to a batch of images on their device, each with parameters of its own.

Nothing here is random and nothing is read back from the device. Three facts keep it short and quick:

* crop, resize and flip are two matrix products, rows and columns, with the triangle filter of Pillow's and
  torchvision's antialiased resize; so is a Gaussian blur, with another filter;
* brightness, contrast, saturation, greyscale and normalisation are affine maps of a pixel's colour, x -> M x + b;
* a hue shift leaves a pixel's largest and smallest channel alone.

Axis legend: B images, C channels, H, W sides, S side of the result, N = S x S pixels in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in grey: torchvision's, after ITU-R 601."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Float[Tensor, "n"]:
    """``values`` on ``device``, copied there once: a copy at every step would make the host wait for the device."""
    return torch.tensor(values, device=device)


@dataclass(frozen=True, eq=False)
class Crop:
    """A box in pixels of each source image; ``flip`` mirrors what it holds left to right."""

    top: Float[Tensor, "B"]
    left: Float[Tensor, "B"]
    height: Float[Tensor, "B"]
    width: Float[Tensor, "B"]
    flip: Bool[Tensor, "B"]


def crop_resize(images: Shaped[Tensor, "B C H W"], crop: Crop, size: int) -> Float[Tensor, "B C S S"]:
    """Each image's box, resized to ``size`` x ``size`` and flipped where asked; bytes come out in [0, 1].

    Equals ``torchvision.transforms.functional.resized_crop(antialias=True)`` and ``hflip``.
    """
    B, C, H, W = images.shape
    rows = _resize_matrix(crop.top, crop.height, H, size)
    columns = _resize_matrix(crop.left, crop.width, W, size, flip=crop.flip)
    if images.dtype == torch.uint8:
        columns.div_(255)
    wide = torch.bmm(images.float().view(B, C * H, W), columns.transpose(1, 2))
    return rows[:, None] @ wide.view(B, C, H, size)


def _resize_matrix(
    start: Float[Tensor, "B"], length: Float[Tensor, "B"], side: int, size: int, flip: Bool[Tensor, "B"] | None = None
) -> Float[Tensor, "B S H"]:
    """Weights of the ``side`` source pixels in each of ``size`` output pixels that cover [start, start + length).

    Pixels outside that range have weight 0, so the result is that of cropping first. The triangle is two pixels wide,
    or two output pixels where the image shrinks.
    """
    ratio = length / size
    output = torch.arange(0.5, size, device=start.device)
    pixel = torch.arange(0.5, side, device=start.device)
    place = output.expand(len(start), size) if flip is None else torch.where(flip[:, None], size - output, output)
    centre = torch.addcmul(start[:, None], ratio[:, None], place)
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weight = (pixel - centre[:, :, None]).abs_().div_(-ratio.clamp(min=1)[:, None, None]).add_(1).clamp_(min=0)
    weight.mul_(inside[:, None, :])
    return weight.div_(weight.sum(2, keepdim=True))


def gaussian_blur(images: Float[Tensor, "B C S S"], sigma: Float[Tensor, "B"]) -> Float[Tensor, "B C S S"]:
    """Each image blurred with its own standard deviation in pixels; a small one, below 0.05, leaves it as it is.

    The whole Gaussian is used, cut off at the image's edge and normalised.
    """
    pixel = torch.arange(images.shape[-1], device=images.device, dtype=torch.float32)
    exponent = ((pixel - pixel[:, None]) / sigma[:, None, None]).square_() / -2
    weight = exponent.softmax(2)[:, None]
    return weight @ images @ weight.transpose(2, 3)


@dataclass(frozen=True, eq=False)
class Jitter:
    """Parameters of a colour jitter.

    Attributes:
        factors: of brightness, contrast and saturation; 1 changes nothing.
        hue: shift as a share of the full circle; 0 changes nothing.
        order: ``order[i, j]`` is the operation, BRIGHTNESS ... HUE, that image i gets j-th.
    """

    factors: Float[Tensor, "B 3"]
    hue: Float[Tensor, "B"]
    order: Int64[Tensor, "B 4"]


def color_jitter(images: Float[Tensor, "B 3 N"], jitter: Jitter) -> Float[Tensor, "B 3 N"]:
    """Brightness, contrast, saturation and hue in each image's own order; pixels in [0, 1].

    An image's blends come before or after its hue shift; every image passes three on either side, with factor 1 where a
    blend belongs to the other side. Six cheap blends and one hue shift then serve all 24 orders at once.
    """
    factors = F.pad(jitter.factors, (0, 1), value=1.0).gather(1, jitter.order)
    before = (jitter.order == HUE).cumsum(1) == 0
    active = torch.cat([before[:, :3], ~before[:, 1:]], 1)
    factors = torch.where(active, torch.cat([factors[:, :3], factors[:, 1:]], 1), 1.0)
    pixel_maps, mean_maps = _blend_maps(factors, torch.cat([jitter.order[:, :3], jitter.order[:, 1:]], 1))
    for place in range(6):
        if place == 3:
            images = shift_hue(images, jitter.hue)
        offset = torch.bmm(mean_maps[:, place], images.mean(2, keepdim=True))
        images = torch.bmm(pixel_maps[:, place], images).add_(offset).clamp_(0, 1)
    return images


def _blend_maps(
    factors: Float[Tensor, "B n"], operations: Int64[Tensor, "B n"]
) -> tuple[Float[Tensor, "B n 3 3"], Float[Tensor, "B n 1 3"]]:
    """``factor x + (1 - factor) reference`` as a map of the pixel's colour and a map of the image's mean colour.

    The reference is black for brightness, the image's mean grey for contrast and the pixel's grey for saturation.
    """
    luma = constant(LUMA, factors.device)
    keep, rest = factors[..., None, None], (1 - factors)[..., None, None]
    pixel = keep * torch.eye(3, device=factors.device) + rest * (operations == SATURATION)[..., None, None] * luma
    return pixel, rest * (operations == CONTRAST)[..., None, None] * luma


def shift_hue(images: Float[Tensor, "B 3 N"], hue: Float[Tensor, "B"]) -> Float[Tensor, "B 3 N"]:
    """Turn the hue by ``hue`` of a full circle; equals ``torchvision.transforms.functional.adjust_hue``."""
    r, g, b = images.unbind(1)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = torch.maximum(torch.maximum(r, g), b).sub_(low)
    divisor = chroma.clamp(min=1e-12)
    r, g, b = ((channel - low).div_(divisor) for channel in (r, g, b))
    # The largest channel is now exactly 1, so floor tells which it is. The angle is in sixths of the circle.
    angle = torch.lerp(torch.lerp(r - g + 4, b - r + 2, g.floor()), g - b, r.floor())
    turn = angle.div_(6).add_(hue[:, None])
    turn = turn.sub_(turn.floor()).mul_(6)
    result = torch.empty_like(images)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        corner = (turn - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        result[:, channel] = corner.mul_(chroma).add_(low)
    return result


def gray_and_normalize(
    images: Float[Tensor, "B 3 N"], gray: Bool[Tensor, "B"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "B 3 N"]:
    """Greyscale where asked, then (x - mean) / std, in one affine map."""
    device = images.device
    deviation = constant(std, device)[:, None]
    colour = torch.where(gray[:, None, None], constant(LUMA, device).expand(3, 3), torch.eye(3, device=device))
    return torch.bmm(colour / deviation, images).sub_(constant(mean, device)[:, None] / deviation)


def normalize(
    images: Float[Tensor, "B C S S"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "B C S S"]:
    """(x - mean) / std for each channel."""
    centre, deviation = constant(mean, images.device), constant(std, images.device)
    return (images - centre[:, None, None]) / deviation[:, None, None]
