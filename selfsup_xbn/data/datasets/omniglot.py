"""Omniglot (Lake et al., 2015): handwritten characters of many alphabets, 20 drawings each, of 28 x 28 pixels.

Rotations of a character by 90, 180 and 270 degrees are separate classes (Santoro et al., 2016), so the numbers of
drawings and classes are multiplied by four. The drawings are inverted to white on black, because convolutions and views
pad with black. Each test drawing is a query against the other test drawings.

Axis legend: N drawings, S side.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.data.datasets._image_tree import ImageTree
from selfsup_xbn.data.datasets.annotations import count_note, data_folder
from selfsup_xbn.data.datasets.folder import class_files
from selfsup_xbn.data.files import SmallFile
from selfsup_xbn.data.workers import ParallelReader
from selfsup_xbn.errors import UserError

SIDE, ROTATIONS, CHUNK = 28, 4, 250
OFFICIAL = {"train": (19_280 * ROTATIONS, 964 * ROTATIONS), "test": (13_180 * ROTATIONS, 659 * ROTATIONS)}
MEAN, STD = (0.0802,), (0.2177,)
"""Mean and standard deviation of the drawings in [0, 1]."""


def load(name: str, path: str, *, root: str, workers: int, **_: object) -> ImageData:
    """Load Omniglot from image folders or from the layout of torchvision.

    Image folders are ``train/CHARACTER`` and ``test/CHARACTER``. The folders of torchvision are
    ``images_background/ALPHABET/CHARACTER`` and ``images_evaluation/ALPHABET/CHARACTER``, with or without the folder
    ``omniglot-py`` around them.

    Args:
        name: The name of the data set.
        path: The folder of the data set, or "" for the folder ``name`` in ``root``.
        root: The folder of all data sets.
        workers: The number of processes that read files.

    Raises:
        UserError: If the folder has neither layout, a character is in both parts, or a file cannot be read.
    """
    folder = data_folder(name, path, root)
    parts = _parts(folder)
    trees = [ImageTree(parts) for _ in parts]
    train, test = (_characters(part, tree) for part, tree in zip(parts, trees, strict=True))
    if common := train.keys() & test.keys():
        raise UserError(f"{folder}: {min(common)} is in both the training set and the test set; remove one of the two")
    splits = _rotated_split(train, 0, workers), _rotated_split(test, len(train) * ROTATIONS, workers)
    return ImageData(
        name=f"{name}:{folder}",
        train=splits[0],
        test=splits[1],
        classes=[
            f"{label} {90 * rotation}°" for part in (train, test) for rotation in range(ROTATIONS) for label in part
        ],
        disjoint=True,
        image_size=SIDE,
        mean=MEAN,
        std=STD,
        augmentation="digits",
        notes=(
            *(count_note(part, split, OFFICIAL[part]) for part, split in zip(OFFICIAL, splits, strict=True)),
            *(note for tree in trees for note in tree.notes()),
        ),
    )


def _parts(folder: Path) -> tuple[Path, Path]:
    for parent in (folder, folder / "omniglot-py"):
        if (parent / "images_background").is_dir():
            return parent / "images_background", parent / "images_evaluation"
    return folder / "train", folder / "test"


def _characters(folder: Path, tree: ImageTree) -> dict[str, list[str]]:
    """Return the drawings of each character. In the official layout its name is ALPHABET/CHARACTER."""
    if not folder.is_dir() and folder.name in ("images_background", "images_evaluation"):
        raise UserError(f"{folder} is not a folder; unpack images_background and images_evaluation into one folder")
    return class_files(folder, tree)


def _rotated_split(characters: dict[str, list[str]], first: int, workers: int) -> Split:
    """Return all drawings, then all of them rotated by 90 degrees, and so on, with labels from ``first`` on."""
    paths = [path for files in characters.values() for path in files]
    labels = torch.tensor([label for label, files in enumerate(characters.values(), first) for _ in files])
    images = _drawings(Split(labels, paths=paths), workers)
    return Split(
        labels=torch.cat([labels + rotation * len(characters) for rotation in range(ROTATIONS)]),
        images=torch.cat([images.rot90(rotation, (2, 3)) for rotation in range(ROTATIONS)]),
    )


def _drawings(split: Split, workers: int) -> UInt8[Tensor, "N 1 S S"]:
    chunks = [range(first, min(first + CHUNK, len(split))) for first in range(0, len(split), CHUNK)]
    pixels = ParallelReader(SmallFile(split, SIDE), min(workers, len(chunks) - 1))(chunks)
    return torch.cat([255 - chunk[:, :1] for chunk in pixels])
