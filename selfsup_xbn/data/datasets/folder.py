"""Folders of image files of any size and format: PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg.

All files are opened when the data set is loaded. They are decoded if they have the same size and fit in memory;
otherwise only their headers are read.

Axis legend: N samples.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.data.datasets import cifar
from selfsup_xbn.data.datasets._image_tree import ImageTree
from selfsup_xbn.data.workers import decode_same_size, image_sizes
from selfsup_xbn.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGEST_VIEW = 224
SMALL_VIEW = 64
"""Maximum side of views with the normalization and augmentation of CIFAR. Larger ones use ImageNet's and MoCo v2's."""


def load(name: str, path: str, *, root: str, cache_bytes: int, workers: int) -> ImageData:
    """Load image folders.

    The labels number the training classes in the order of their names, and then the classes that only the test set has.
    The side of the views is the median of the images' shorter sides, at most 224 pixels.

    Args:
        name: The name of the data set.
        path: The folder that contains ``train`` and ``test``.
        root: Not used.
        cache_bytes: The most bytes that the decoded images may take in memory.
        workers: The number of processes that read files.

    Raises:
        UserError: If a split or the images of a class are missing, or a file cannot be read.
    """
    if not path:
        raise UserError("folder: expected a path, got none; write folder:PATH")
    parts = [Path(path).expanduser() / part for part in ("train", "test")]
    trees = [ImageTree(parts) for _ in parts]
    train, test = (class_files(part, tree) for part, tree in zip(parts, trees, strict=True))
    numbers = {label: number for number, label in enumerate([*train, *(label for label in test if label not in train)])}
    splits = [_split(part, numbers) for part in (train, test)]
    splits, side = _open_splits(splits, cache_bytes, workers)
    mean, std = (cifar.MEAN, cifar.STD) if side <= SMALL_VIEW else (IMAGENET_MEAN, IMAGENET_STD)
    return ImageData(
        name=f"{name}:{path}",
        train=splits[0],
        test=splits[1],
        classes=list(numbers),
        disjoint=not set(train) & set(test),
        image_size=side,
        mean=mean,
        std=std,
        augmentation="cifar" if side <= SMALL_VIEW else "photo",
        notes=tuple(note for tree in trees for note in tree.notes()),
    )


def class_files(folder: Path, tree: ImageTree) -> dict[str, list[str]]:
    """Return the image files of each class folder at any depth, with classes and files sorted by name.

    Args:
        folder: The folder of the class folders.
        tree: The files of the part of the data set, which counts what is skipped.

    Raises:
        UserError: If the folder does not exist, has no class folders, or a class folder contains no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected image folders train/CLASS/ and test/CLASS/")
    classes = tree.class_names(folder)
    if not classes:
        raise UserError(
            f"{folder}: expected one folder per class, got none; put the images of each class into a separate folder"
        )
    files = dict(zip(classes, tree.files(folder / label for label in classes), strict=True))
    if empty := next((label for label, members in files.items() if not members), None):
        skipped = "".join(f" ({note})" for note in tree.notes())
        raise UserError(
            f"{folder / empty}: expected at least one image ({' '.join(IMG_EXTENSIONS)}), got none{skipped}; "
            "add images or remove the folder"
        )
    return files


def _split(files: dict[str, list[str]], numbers: dict[str, int]) -> Split:
    labels = [numbers[label] for label, members in files.items() for _ in members]
    return Split(torch.tensor(labels), paths=[file for members in files.values() for file in members])


def _open_splits(splits: list[Split], cache_bytes: int, workers: int) -> tuple[list[Split], int]:
    """Return the splits, decoded if possible, and the side of the views."""
    paths = [path for split in splits for path in split.paths or ()]
    images = decode_same_size(paths, cache_bytes, workers)
    if images is None:
        return splits, min(LARGEST_VIEW, int(image_sizes(paths, workers).amin(1).median()))
    pixels = images.split([len(split) for split in splits])
    splits = [Split(split.labels, part) for split, part in zip(splits, pixels, strict=True)]
    return splits, min(LARGEST_VIEW, *images.shape[2:])
