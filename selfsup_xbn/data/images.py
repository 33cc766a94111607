"""Image files: one way to read a file, and one way to read many of them at once, with worker processes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from selfsup_xbn.errors import UserError

MAX_PIXELS = 2**27
"""Larger images are refused: a small file can unpack to more memory than there is."""

Box = Sequence[int]


def read_image(path: str, box: Box | None = None) -> Image.Image:
    """The file's pixels as 8-bit RGB, upright as its EXIF orientation says; ``box`` (x1, y1, x2, y2) is cut out.

    16-bit grey is scaled to 8 bits; transparent pixels show a white ground; of several frames the first is taken.

    Raises:
        UserError: the file cannot be read, is no image, is broken, has more than ``MAX_PIXELS`` pixels, or does not
            overlap with the box.
    """
    with open_image(path) as image:
        try:
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            image = _to_rgb(image)
        except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes
            raise UserError(f"{path}: the image cannot be decoded ({error}); repair or remove the file") from error
    return image if box is None else image.crop(_clipped(path, box, image.size))


def open_image(path: str) -> Image.Image:
    """The file with its header read and its size checked, pixels not yet decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: the image is too large ({error}); shrink or remove the file") from error
    except Exception as error:
        raise UserError(f"{path}: not a readable image ({error}); repair or remove the file") from error
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{path}: expected at most {MAX_PIXELS} pixels, got {image.width} x {image.height}; shrink the image"
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's convert would clip them to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _clipped(path: str, box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (int(value) for value in box)
    inside = max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise UserError(
            f"{path}: expected a box that overlaps the {size[0]} x {size[1]} image, got {(x1, y1, x2, y2)}; "
            "correct the annotation"
        )
    return inside


def to_bytes(image: Image.Image) -> torch.Tensor:
    """Pixels [3, H, W] uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
