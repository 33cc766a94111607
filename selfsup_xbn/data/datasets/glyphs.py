"""Glyphs: characters of many scripts, rendered from the fonts that matplotlib ships, which need no download.

A class is a character, and its images are its renderings in up to 16 fonts: sans serif, monospaced and serif, upright,
bold and oblique. In ``glyphs`` they are upright and centered. In ``glyphs-jittered`` each one is slightly rotated,
sheared, scaled and shifted at random, as a drawing is, so that pixels are poor embeddings. Combining marks and
modifiers are left out, and so are characters that look like an earlier one. Each test image is a query against the
other ones.

Axis legend: A characters, R fonts, r renderings of a character.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.errors import UserError

REGULAR_FONTS = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
FONTS = (
    *REGULAR_FONTS,
    *(f"DejaVu{family}{style}" for family in ("Sans", "SansMono") for style in ("-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("Bol", "Italic", "BolIta")),
)
CATEGORIES = {"Lu", "Ll", "Lt", "Lo", "Nd", "No", "Sm", "Sc", "So"}
"""Unicode categories of the characters: letters, numbers and symbols, without modifiers and combining marks."""
FONTS_WITH_CHARACTER, DISTINCT_RENDERINGS = 10, 8
"""Smallest number of fonts that have a character, and of renderings of it that differ."""
SIDE, POINTS, LARGEST = 28, 22, 26
"""Side of an image, size of the font and largest side of a character, in pixels."""
ALIKE = 0.97
"""Cosine similarity of the pixels of two characters in a regular font from which they look alike."""
DEGREES, ZOOM, SHIFT = 10.0, (0.8, 1.1), 2.0
"""Largest angle of rotation and of shear, smallest and largest scale, and largest shift in pixels of a rendering."""
SEED, TRAINING_SHARE = 0, 2 / 3
"""Seed of the split and of the random changes, and share of the training characters."""
JITTERED = "glyphs-jittered"
STATISTICS = {"glyphs": ((0.109,), (0.2868,)), JITTERED: ((0.0986,), (0.2542,))}
"""Mean and standard deviation of the training pixels in [0, 1]."""


def load(name: str, path: str, **_: object) -> ImageData:
    """Load the renderings of the training and of the test characters. The images and the split are fixed.

    Args:
        name: ``"glyphs"`` or ``"glyphs-jittered"``.
        path: "", because the images are not read from a folder.

    Raises:
        UserError: If ``path`` is not empty, or matplotlib has no fonts.
    """
    if path:
        raise UserError(f"{name}:{path}: expected no path, because the images are rendered; write {name}")
    return _data(name)


@cache
def _data(name: str) -> ImageData:
    characters, images = _characters()
    classes: list[str] = []
    splits = []
    for training in (True, False):
        part = [i for i, character in enumerate(characters) if is_training(character) == training]
        renderings = [_renderings(images[i]) for i in part]
        if name == JITTERED:
            renderings = [_changed(characters[i], rows) for i, rows in zip(part, renderings, strict=True)]
        labels = torch.arange(len(classes), len(classes) + len(part))
        counts = torch.tensor([len(rows) for rows in renderings])
        splits.append(Split(labels.repeat_interleave(counts), torch.cat(renderings)[:, None]))
        classes += [characters[i] for i in part]
    return ImageData(
        name=name,
        train=splits[0],
        test=splits[1],
        classes=classes,
        disjoint=True,
        image_size=SIDE,
        mean=STATISTICS[name][0],
        std=STATISTICS[name][1],
        augmentation="digits",
        digest=_digest(splits),
    )


@cache
def _characters() -> tuple[list[str], UInt8[Tensor, "A R 28 28"]]:
    """Return the characters of both data sets and their renderings."""
    return _distinct(*_rendered())


def is_training(character: str) -> bool:
    """Return whether a character is one of the training characters.

    The answer depends on a hash of the character, and not on the other characters that the fonts have.

    Example:
        >>> [character for character in "abcdefgh" if is_training(character)]
        ['a', 'b', 'd', 'e', 'f', 'g', 'h']
    """
    return _hash(character) < TRAINING_SHARE * 2**32


def _hash(character: str) -> int:
    """Return a number of 32 bits that depends on ``SEED`` and the character."""
    return int.from_bytes(hashlib.sha256(f"{SEED} {ord(character):x}".encode()).digest()[:4], "big")


def _rendered() -> tuple[list[str], UInt8[Tensor, "A R 28 28"]]:
    """Return the characters in the order of their code points, and their renderings. Missing renderings are black."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [str(folder / f"{font}.ttf") for font in FONTS]
    try:
        fonts = [ImageFont.FreeTypeFont(file, POINTS, layout_engine=ImageFont.Layout.BASIC) for file in files]
    except OSError as error:
        raise UserError(f"glyphs: expected the fonts of matplotlib in {folder} ({error}): reinstall it") from None
    known = [set(FT2Font(file).get_charmap()) for file in files]
    counts = Counter(code for codes in known for code in codes)
    several = sorted(code for code, count in counts.items() if count >= FONTS_WITH_CHARACTER)
    characters = [chr(code) for code in several if unicodedata.category(chr(code)) in CATEGORIES]
    images = np.zeros((len(characters), len(fonts), SIDE, SIDE), np.uint8)
    for column, font in enumerate(fonts):
        for row, character in enumerate(characters):
            if ord(character) in known[column]:
                images[row, column] = np.asarray(_render(character, font))
    return characters, torch.from_numpy(images)


def _render(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return a character in white on black, centered, and reduced if it is larger than ``LARGEST``."""
    left, top, right, bottom = font.getbbox(character)
    side = max(right - left, bottom - top)
    if side > LARGEST:
        font = font.font_variant(size=int(POINTS * LARGEST / side))
        left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (SIDE, SIDE))
    corner = (SIDE - right - left) / 2, (SIDE - bottom - top) / 2
    ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
    return image


def _distinct(
    characters: list[str], images: UInt8[Tensor, "A R 28 28"]
) -> tuple[list[str], UInt8[Tensor, "a R 28 28"]]:
    """Return the characters that have enough renderings and do not look like an earlier one, and their renderings."""
    several = torch.tensor([len(_renderings(rows)) >= DISTINCT_RENDERINGS for rows in images]).nonzero().flatten()
    index = several[first_of_alike(images[several, : len(REGULAR_FONTS)])]
    return [characters[i] for i in index.tolist()], images[index]


def _renderings(images: UInt8[Tensor, "R 28 28"]) -> UInt8[Tensor, "r 28 28"]:
    """Return the renderings of a character without copies and black images, in the order of the fonts."""
    first = {image.tobytes(): row for row, image in reversed(list(enumerate(images.numpy()))) if image.any()}
    return images[sorted(first.values())]


def first_of_alike(images: UInt8[Tensor, "A R H W"]) -> Bool[Tensor, "A"]:
    """Return which characters look like none of the characters that were kept before them.

    Two characters look alike if the cosine similarity of their pixels is at least ``ALIKE`` in one of the fonts.

    Args:
        images: The rendering of each character in each font. A black image looks like no other.

    Example:
        >>> glyphs = torch.tensor([[[[0, 1]]], [[[1, 0]]], [[[0, 2]]]], dtype=torch.uint8)
        >>> first_of_alike(glyphs).tolist()
        [True, True, False]
    """
    alike = torch.zeros(len(images), len(images), dtype=torch.bool)
    for rendering in images.flatten(2).unbind(1):
        pixels = F.normalize(rendering.float(), dim=1)
        alike |= pixels @ pixels.T >= ALIKE
    kept = torch.ones(len(images), dtype=torch.bool)
    for row in range(len(images)):
        if kept[row]:
            kept[row + 1 :] &= ~alike[row, row + 1 :]
    return kept


def _changed(character: str, images: UInt8[Tensor, "r 28 28"]) -> UInt8[Tensor, "r 28 28"]:
    """Return the renderings of a character, each rotated, sheared, scaled and shifted by a random amount."""
    rng = np.random.Generator(np.random.PCG64(_hash(character)))
    changed = [Image.fromarray(image).transform((SIDE, SIDE), *_map(rng.random(5))) for image in images.numpy()]
    return torch.from_numpy(np.stack([np.asarray(image) for image in changed]))


def _map(uniform: np.ndarray) -> tuple[Image.Transform, list[float], Image.Resampling]:
    """Return the arguments of ``Image.transform`` for an affine map about the center.

    The linear part is rotation x shear / scale, from the pixels of the result to those of the rendering.

    Args:
        uniform: Five numbers in [0, 1).
    """
    angle, slant = (math.radians(DEGREES * (2 * number - 1)) for number in uniform[:2])
    x, y = (SHIFT * (2 * number - 1) for number in uniform[2:4])
    scale = ZOOM[0] + (ZOOM[1] - ZOOM[0]) * uniform[4]
    a, c = math.cos(angle) / scale, math.sin(angle) / scale
    b, d = a * math.tan(slant) - c, c * math.tan(slant) + a
    middle = SIDE / 2
    offsets = [middle + x - a * middle - b * middle, middle + y - c * middle - d * middle]
    return Image.Transform.AFFINE, [a, b, offsets[0], c, d, offsets[1]], Image.Resampling.BILINEAR


def _digest(splits: list[Split]) -> str:
    """Return the SHA-256 of the images and labels."""
    digest = hashlib.sha256()
    for split in splits:
        assert split.images is not None
        digest.update(split.images.numpy().tobytes())
        digest.update(split.labels.numpy().tobytes())
    return digest.hexdigest()
