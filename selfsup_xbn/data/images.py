"""Reading of single image files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from selfsup_xbn.errors import UserError
from selfsup_xbn.utils.files import open_regular

MAX_PIXELS = 2**27
"""Maximum number of pixels of an image. Without it a small file could decode to more memory than is available."""

SIXTEEN_BITS = ("PNG", "PPM")
"""Formats in which mode "I" of Pillow stands for integers from 0 to 65535. In TIFF it stands for any integers."""

QUARTER_TURNS = (5, 6, 7, 8)
"""Orientations of EXIF that exchange width and height."""

Box = Sequence[int]


def read_image(path: str, box: Box | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB, rotated according to its EXIF orientation.

    Gray images of 16 bits are scaled to 8 bits. Transparent images are composed with a white background. Of an
    animation the first frame is read.

    Args:
        path: The image file.
        box: The box (x1, y1, x2, y2) in pixels to crop, with x2 and y2 exclusive. ``None`` for the whole image.

    Raises:
        UserError: If the file cannot be read, is not an image of 8 or 16 bits, is broken or has more than
            ``MAX_PIXELS`` pixels, or if the box does not overlap the image.
    """
    with open_image(path) as image:
        try:
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            image = _to_rgb(image)
        except Exception as error:  # Pillow's decoders raise many types of exceptions for broken files
            raise UserError(f"{path}: the image cannot be decoded ({error}); repair or remove the file") from error
    return image if box is None else image.crop(_clip(path, box, image.size))


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Open an image file and check its size and the type of its pixels, without decoding them.

    Yields:
        The image. The file is closed when the block ends.

    Raises:
        UserError: If the path is not a regular file, the file cannot be read, is not an image of 8 or 16 bits or has
            more than ``MAX_PIXELS`` pixels.
    """
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: not a readable image ({reason}); repair or remove the file") from error
    with file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(file)
        except Image.DecompressionBombError as error:
            raise UserError(f"{path}: the image is too large ({error}); shrink or remove the file") from error
        except Exception as error:
            known = not isinstance(error, UnidentifiedImageError)
            reason = error if known else "no image format that can be read"
            raise UserError(f"{path}: not a readable image ({reason}); repair or remove the file") from error
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"{path}: expected at most {MAX_PIXELS} pixels, got {image.width} x {image.height}; shrink the image"
            )
        if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS):
            kind = "floating-point numbers" if image.mode == "F" else "signed or 32-bit integers"
            raise UserError(
                f"{path}: expected pixels of 8 or 16 bits, got {kind}, whose black and white are not defined; "
                "scale them and save the image with 8 bits"
            )
        yield image


def upright_size(path: str) -> tuple[int, int]:
    """Return the width and height of an image as ``read_image`` returns it, from the header of a JPEG file.

    Raises:
        UserError: As in ``open_image``.
    """
    with open_image(path) as image:
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception as error:  # Pillow raises many types of exceptions for broken files
            raise UserError(f"{path}: the header cannot be read ({error}); repair or remove the file") from error
        width, height = image.size
        return (height, width) if orientation in QUARTER_TURNS else (width, height)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, which Image.convert would clip to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _clip(path: str, box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (int(value) for value in box)
    inside = max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise UserError(
            f"{path}: expected a box that overlaps the {size[0]} x {size[1]} image, got {(x1, y1, x2, y2)}; "
            "correct the annotation"
        )
    return inside


def to_bytes(image: Image.Image) -> torch.Tensor:
    """Return the pixels of an RGB image as a uint8 tensor of shape [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
