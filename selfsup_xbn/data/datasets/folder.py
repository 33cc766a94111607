"""Folders of image files of any size and format.

Layouts, where a class is a folder that contains images, at any depth (``fruit/apple`` is a class with that name):

- ``PATH/train/CLASS`` and ``PATH/test/CLASS``, and optionally ``PATH/val/CLASS`` (or ``validation``) to select the best
  model.
- ``PATH/train/CLASS``, ``PATH/query/CLASS`` and ``PATH/gallery/CLASS``.
- ``PATH/train/CLASS`` alone or ``PATH/CLASS``: all images train, until ``--split-classes`` divides the classes.
- ``PATH/*.jpg`` or ``PATH/train/*.jpg``: images without classes, for pretraining.

``Train`` or ``TRAIN`` is ``train``, and likewise for the other parts.

All files are opened when the data set is loaded. They are decoded if they have the same size and fit in memory;
otherwise only their headers are read.

Axis legend: N samples.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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

PARTS = {
    "train": "train",
    "val": "validation",
    "validation": "validation",
    "test": "test",
    "query": "test",
    "gallery": "gallery",
}
"""The split of ``ImageData`` that each folder, or each value of a column ``split``, stands for."""

NO_CLASS = ""
"""The class of images without classes."""

Classes = dict[str, list[str]]
"""The image files of each class."""


def load(name: str, path: str, *, root: str, cache_bytes: int, workers: int) -> ImageData:
    """Load image folders.

    The labels number the training classes in the order of their names, and then the classes that only the other splits
    have. The side of the views is the median of the images' shorter sides, at most 224 pixels.

    Args:
        name: The name of the data set.
        path: The folder that contains ``train`` and the other splits, or the images of all classes.
        root: Not used.
        cache_bytes: The most bytes that the decoded images may take in memory.
        workers: The number of processes that read files.

    Raises:
        UserError: If a split or the images of a class are missing, or a file cannot be read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        remedy = f"write list:{path}" if folder.is_file() else "expected image folders train/CLASS/ and test/CLASS/"
        where = f"{folder}" if folder.is_absolute() else f"{folder} in {Path.cwd()}"
        raise UserError(f"{where} is not a folder; {remedy}")
    folders = _folders(folder)
    actual = {name.lower(): name for name in folders if name.lower() in PARTS}
    if len(actual) < sum(name.lower() in PARTS for name in folders):
        raise UserError(f"{folder}: expected folders whose names differ by more than case, got {', '.join(folders)}")
    names = [name for name in PARTS if name in actual]
    if names:
        check_parts(names, str(folder))
    read = class_files if len(names) > 1 else _classes_or_images
    paths = [folder / actual[name] for name in names] or [folder]
    trees = [ImageTree(paths) for _ in paths]
    classes = [read(part, tree) for part, tree in zip(paths, trees, strict=True)]
    parts = {PARTS[name]: files for name, files in zip(names or ["train"], classes, strict=True)}
    unused = [name for name in folders if names and name.lower() not in PARTS]
    notes = [f"note: not used: {', '.join(unused)} in {folder}"] if unused else []
    notes += [note for tree in trees for note in tree.notes()]
    return image_data(f"{name}:{path}", parts, cache_bytes, workers, notes)


def image_data(
    name: str, parts: Mapping[str, Classes], cache_bytes: int, workers: int, notes: Sequence[str] = ()
) -> ImageData:
    """Return a data set of image files. Without test images, validation images take their place.

    Args:
        name: The specification of the data set.
        parts: The files of each class in ``"train"`` and optionally ``"validation"``, ``"test"`` and ``"gallery"``.
        cache_bytes: The most bytes that the decoded images may take in memory.
        workers: The number of processes that read files.
        notes: Lines for the user.

    Raises:
        UserError: If there are test images without classes, or a file cannot be read.
    """
    parts = dict(parts)
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
        notes = [*notes, "note: there are no test images, so the validation images are the test images"]
    if NO_CLASS in parts["train"] and len(parts) > 1:
        raise UserError(f"{name}: expected a label for each image if there are test images, got none")
    others = [label for part in ("validation", "test", "gallery") for label in parts.get(part, ())]
    numbers = {label: number for number, label in enumerate(dict.fromkeys([*parts["train"], *others]))}
    opened, side = _open_splits([_split(part, numbers) for part in parts.values()], cache_bytes, workers)
    splits = dict(zip(parts, opened, strict=True))
    mean, std = (cifar.MEAN, cifar.STD) if side <= SMALL_VIEW else (IMAGENET_MEAN, IMAGENET_STD)
    return ImageData(
        name=name,
        train=splits["train"],
        test=splits.get("test", splits["train"].subset(torch.arange(0))),
        validation=splits.get("validation"),
        gallery=splits.get("gallery"),
        classes=list(numbers),
        labelled=NO_CLASS not in numbers,
        disjoint="test" in parts and not parts["train"].keys() & parts["test"].keys(),
        image_size=side,
        mean=mean,
        std=std,
        augmentation="cifar" if side <= SMALL_VIEW else "photo",
        notes=tuple(notes),
    )


def check_parts(names: Sequence[str], where: str) -> None:
    """Check that folders, or values of a column ``split``, form a data set.

    Args:
        names: Keys of ``PARTS``.
        where: The place of the data set, for error messages.

    Raises:
        UserError: If training images are missing, two names stand for the same split, or a gallery has no queries.
    """
    if "train" not in names:
        raise UserError(f"{where}: expected training images in train, got only {', '.join(names)}")
    for pair in (("val", "validation"), ("test", "query")):
        if set(pair) <= set(names):
            raise UserError(f"{where}: expected one of {pair[0]} and {pair[1]}, got both; rename or remove one")
    if "gallery" in names and not {"test", "query"} & set(names):
        raise UserError(f"{where}: expected query beside gallery, got none; add query, or rename gallery to test")


def class_files(folder: Path, tree: ImageTree) -> Classes:
    """Return the image files of each class, with classes and files sorted by name.

    A class is a folder that contains images. Its name is its path below ``folder``.

    Args:
        folder: The folder of the class folders.
        tree: The files of the part of the data set, which counts what is skipped.

    Raises:
        UserError: If the folder does not exist, has no class folders, or a class folder contains no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected image folders train/CLASS/ and test/CLASS/")
    names = tree.class_names(folder)
    if not names:
        raise UserError(
            f"{folder}: expected one folder per class, got none; put the images of each class into a separate folder"
        )
    classes: Classes = {}
    for name, images in zip(names, tree.files(folder / name for name in names), strict=True):
        if not images:
            skipped = "".join(f" ({note})" for note in tree.notes())
            raise UserError(
                f"{folder / name}: expected at least one image ({' '.join(IMG_EXTENSIONS)}), got none{skipped}; "
                "add images or remove the folder"
            )
        for image in images:
            classes.setdefault(os.path.relpath(os.path.dirname(image), folder), []).append(image)
    return {name.replace(os.sep, "/"): classes[name] for name in sorted(classes)}


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _classes_or_images(folder: Path, tree: ImageTree) -> Classes:
    """Return the classes or, in a folder without folders, all images as ``NO_CLASS``."""
    images = [] if _folders(folder) else tree.files([folder])[0]
    return {NO_CLASS: images} if images else class_files(folder, tree)


def _split(files: Classes, numbers: Mapping[str, int]) -> Split:
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
