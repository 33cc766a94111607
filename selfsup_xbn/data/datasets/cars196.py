"""Cars196 (Krause et al., 2013) for retrieval (Song et al., 2016): classes 1 to 98 train, 99 to 196 test.

Three layouts are supported:

- ``cars_annos.mat`` with the images in ``car_ims``.
- The layout of torchvision's ``StanfordCars``: ``devkit`` and ``cars_test_annos_withlabels.mat`` with the images in
  ``cars_train`` and ``cars_test``.
- Image folders ``train/CLASS`` and ``test/CLASS``.

The bounding boxes are not used. Each test image is a query against the other test images.
"""

from __future__ import annotations

import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from scipy.io import loadmat

from selfsup_xbn.data.base import ImageData
from selfsup_xbn.data.datasets import folder as image_folders
from selfsup_xbn.data.datasets.annotations import (
    ImageFolders,
    Sample,
    count_note,
    data_folder,
    quoted,
    read_content,
    retrieval_data,
)
from selfsup_xbn.errors import UserError

TRAINING_CLASSES, CLASSES = 98, 196
COMPRESSED, MAX_BYTES = 15, 2**28
"""Type of a compressed element of a MATLAB file, and maximum size of all elements once they are unpacked."""
OFFICIAL = {"train": (8_054, 98), "test": (8_131, 98)}
LAYOUTS = (
    (("cars_annos.mat", ".", "relative_im_path"),),
    (
        ("devkit/cars_train_annos.mat", "cars_train", "fname"),
        ("cars_test_annos_withlabels.mat", "cars_test", "fname"),
    ),
)
"""Annotation files of each official layout, with the folder of their images and the field that names an image."""


def load(name: str, path: str, *, root: str, cache_bytes: int, workers: int) -> ImageData:
    """Load Cars196 from one of the three layouts.

    Args:
        name: The name of the data set.
        path: The folder of the data set, or "" for the folder ``name`` in ``root``.
        root: The folder of all data sets.
        cache_bytes: The most bytes that decoded image folders may take in memory.
        workers: The number of processes that read image folders.

    Raises:
        UserError: If the folder has none of the layouts, an annotation file is missing or malformed, or an image is
            missing or, in image folders, cannot be read.
    """
    folder = data_folder(name, path, root)
    for layout in LAYOUTS:
        if (folder / layout[0][0]).exists():
            samples = [sample for file, base, key in layout for sample in _samples(folder / file, folder / base, key)]
            parts = {
                "train": [sample for sample in samples if int(sample.label) <= TRAINING_CLASSES],
                "test": [sample for sample in samples if int(sample.label) > TRAINING_CLASSES],
            }
            return retrieval_data(f"{name}:{folder}", parts, OFFICIAL)
    if not (folder / "train").is_dir():
        files = ", ".join(layout[0][0] for layout in LAYOUTS)
        raise UserError(f"{folder}: expected {files} or train/CLASS/, got none of them; unpack Cars196 there")
    return _from_folders(name, folder, cache_bytes, workers)


def _from_folders(name: str, folder: Path, cache_bytes: int, workers: int) -> ImageData:
    data = image_folders.load(name, str(folder), root="", cache_bytes=cache_bytes, workers=workers)
    if not data.disjoint:
        raise UserError(
            f"{folder}: expected different classes in train and test, got common ones; "
            "put classes 99 to 196 into test only"
        )
    counts = (count_note(part, getattr(data, part), OFFICIAL[part]) for part in OFFICIAL)
    return replace(data, notes=(*counts, *data.notes))


def _samples(file: Path, base: Path, key: str) -> list[Sample]:
    images = ImageFolders(base)
    samples = []
    for number, entry in enumerate(_entries(file), 1):
        where = f"{file}: annotation {number}"
        image, label = (entry.get(field) if isinstance(entry, dict) else None for field in (key, "class"))
        if not isinstance(image, str) or not isinstance(label, int) or not 1 <= label <= CLASSES:
            raise UserError(
                f"{where}: expected {key} to be a string and class an integer from 1 to {CLASSES}, "
                f"got {quoted(image)} and {quoted(label)}"
            )
        samples.append(Sample(where, images.find(where, image), label))
    return samples


def _entries(file: Path) -> list[Any]:
    """Read the annotations in a separate process, because scipy's reader may crash the process for broken files."""
    content = read_content(file)
    try:
        with ProcessPoolExecutor(1) as pool:
            return pool.submit(_annotations, content).result()
    except Exception as error:  # scipy raises many types of exceptions for broken files
        raise UserError(
            f"{file}: not a MATLAB file with annotations ({quoted(str(error))}); unpack it again"
        ) from error


def _annotations(content: bytes) -> list[Any]:
    _check_unpacked(content)
    annotations = loadmat(BytesIO(content), simplify_cells=True)["annotations"]
    return [annotations] if isinstance(annotations, dict) else list(annotations)


def _check_unpacked(content: bytes) -> None:
    """Check the size of the compressed elements of a MATLAB file, because a small file may unpack to any size.

    Raises:
        ValueError: If they take more than ``MAX_BYTES``.
    """
    position, total = 128, 0  # after the header
    order: Literal["big", "little"] = "big" if content[126:128] == b"MI" else "little"
    while position + 8 <= len(content):
        kind, size = (int.from_bytes(content[start : start + 4], order) for start in (position, position + 4))
        if kind == COMPRESSED:
            unpacker = zlib.decompressobj()
            total += len(unpacker.decompress(content[position + 8 : position + 8 + size], MAX_BYTES + 1 - total))
            if total > MAX_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_BYTES:,} bytes")
        position += 8 + size
