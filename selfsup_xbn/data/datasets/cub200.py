"""Caltech-UCSD Birds-200-2011 (Wah et al., 2011) for retrieval (Song et al., 2016): the first 100 species train.

https://www.vision.caltech.edu/datasets/cub_200_2011/. The bounding boxes are not used, and neither is the split in
``train_test_split.txt``, which is for classification. Each test image is a query against the other test images.

The fields of the lists may be separated by commas, and the classes may be numbered from 0, as in some copies. Then the
images of class 0 are in the folder ``001.*``.
"""

from __future__ import annotations

from pathlib import Path

from selfsup_xbn.data.base import ImageData
from selfsup_xbn.data.datasets.annotations import (
    ImageFolders,
    Sample,
    data_folder,
    find_file,
    read_table,
    retrieval_data,
)
from selfsup_xbn.errors import UserError

TRAINING_CLASSES, CLASSES = 100, 200
SEPARATOR = r"(?:\s*,\s*|\s+)"
OFFICIAL = {"train": (5_864, 100), "test": (5_924, 100)}


def load(name: str, path: str, *, root: str, **_: object) -> ImageData:
    """Load CUB-200-2011 from ``images.txt``, ``image_class_labels.txt`` and ``images``.

    Args:
        name: The name of the data set.
        path: The folder that contains these files or the folder ``CUB_200_2011`` with them, or "" for the folder
            ``name`` in ``root``.
        root: The folder of all data sets.

    Raises:
        UserError: If a list is missing or malformed, an image has no class, or an image is missing.
    """
    folder = data_folder(name, path, root)
    file = find_file("images.txt", (folder, folder / "CUB_200_2011"))
    paths = _by_id(file, "image_id path", numbers=1)
    label_file = file.with_name("image_class_labels.txt")
    classes = _by_id(label_file, "image_id class_id", numbers=2)
    for rows, other_rows, other_file in ((paths, classes, label_file), (classes, paths, file)):
        for number in rows.keys() - other_rows.keys():
            raise UserError(f"{rows[number][0]}: image_id {number} is missing from {other_file}; add it there")
    images = ImageFolders(file.parent / "images")
    zeros = [paths[number][1] for number, (_, value) in classes.items() if int(value) == 0]
    first = 0 if zeros and all(image.startswith("001.") for image in zeros) else 1
    parts: dict[str, list[Sample]] = {part: [] for part in OFFICIAL}
    for number, (where, image) in paths.items():
        label = _class(*classes[number], first)
        part = "train" if label <= TRAINING_CLASSES else "test"
        parts[part].append(Sample(where, images.find(where, image), label))
    return retrieval_data(f"{name}:{folder}", parts, OFFICIAL)


def _by_id(file: Path, columns: str, numbers: int) -> dict[int, tuple[str, str]]:
    """Return the position FILE:LINE and the second field of the row of each image_id."""
    rows: dict[int, tuple[str, str]] = {}
    for where, (number, value) in read_table(file, columns, numbers=numbers, separator=SEPARATOR):
        first, _ = rows.setdefault(int(number), (where, value))
        if first is not where:
            raise UserError(f"{where}: image_id {number} is already listed in {first}; remove one of the two")
    return rows


def _class(where: str, value: str, first: int) -> int:
    """Return the class counted from 1. ``first`` is the smallest class of the list, 0 or 1."""
    if not first <= int(value) < first + CLASSES:
        raise UserError(f"{where}: expected a class_id from {first} to {first + CLASSES - 1}, got {int(value)}")
    return int(value) + 1 - first
