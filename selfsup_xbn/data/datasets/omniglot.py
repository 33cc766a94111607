"""Omniglot (Lake et al., 2015): handwritten characters of many alphabets, 20 drawings each, at 28 x 28 in memory.

A character turned by 90, 180 or 270 degrees counts as another class (Santoro et al., 2016), so there are four times as
many drawings and classes. Ink is white on black: black is what convolutions and views pad with. Test drawings are
searched among themselves.

Axis legend: N drawings, n drawings with all turns (4 N).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.data.datasets.annotations import count_note, home
from selfsup_xbn.data.datasets.folder import class_files
from selfsup_xbn.data.files import SmallFile
from selfsup_xbn.data.workers import ParallelReader
from selfsup_xbn.errors import UserError

SIDE, TURNS, CHUNK = 28, 4, 250
OFFICIAL = {"train": (19_280 * TURNS, 964 * TURNS), "test": (13_180 * TURNS, 659 * TURNS)}
MEAN, STD = (0.0802,), (0.2177,)
"""Of the drawings in [0, 1]."""


def load(name: str, path: str, *, root: str, workers: int, **_: object) -> ImageData:
    """Image folders ``train/CHARACTER`` and ``test/CHARACTER``, or as torchvision has them
    ``images_background/ALPHABET/CHARACTER`` and ``images_evaluation``, also in ``omniglot-py``.

    Raises:
        UserError: neither layout, a character that is in both parts, or a file that cannot be read.
    """
    folder = home(name, path, root)
    train, test = (_characters(place) for place in _parts(folder))
    if common := train.keys() & test.keys():
        raise UserError(f"{folder}: {min(common)} is in both the training set and the test set; remove one of the two")
    splits = _turned(train, 0, workers), _turned(test, len(train) * TURNS, workers)
    return ImageData(
        name=f"{name}:{folder}",
        train=splits[0],
        test=splits[1],
        classes=[f"{label} {90 * turn}°" for part in (train, test) for turn in range(TURNS) for label in part],
        disjoint=True,
        image_size=SIDE,
        mean=MEAN,
        std=STD,
        augmentation="digits",
        notes=tuple(count_note(part, split, OFFICIAL[part]) for part, split in zip(OFFICIAL, splits, strict=True)),
    )


def _parts(folder: Path) -> tuple[Path, Path]:
    for place in (folder, folder / "omniglot-py"):
        if (place / "images_background").is_dir():
            return place / "images_background", place / "images_evaluation"
    return folder / "train", folder / "test"


def _characters(folder: Path) -> dict[str, list[str]]:
    """The drawings of each character; in the official layout its name is ALPHABET/CHARACTER."""
    if folder.name not in ("images_background", "images_evaluation"):
        return class_files(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; unpack images_background and images_evaluation into one folder")
    alphabets = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return {
        f"{alphabet}/{character}": files
        for alphabet in alphabets
        for character, files in class_files(folder / alphabet).items()
    }


def _turned(characters: dict[str, list[str]], first: int, workers: int) -> Split:
    """All drawings, then all of them turned by 90 degrees, and so on; labels from ``first`` on in the same order."""
    paths = [path for files in characters.values() for path in files]
    labels = torch.tensor([label for label, files in enumerate(characters.values(), first) for _ in files])
    images = _drawings(Split(labels, paths=paths), workers)
    return Split(
        labels=torch.cat([labels + turn * len(characters) for turn in range(TURNS)]),
        images=torch.cat([images.rot90(turn, (2, 3)) for turn in range(TURNS)]),
    )


def _drawings(split: Split, workers: int) -> UInt8[Tensor, "N 1 S S"]:
    chunks = [range(first, min(first + CHUNK, len(split))) for first in range(0, len(split), CHUNK)]
    pixels = ParallelReader(SmallFile(split, SIDE), min(workers, len(chunks) - 1))(chunks)
    return torch.cat([255 - chunk[:, :1] for chunk in pixels])
