"""Functions shared by the retrieval benchmarks: reading annotation files, finding images and numbering classes.

Errors in an annotation file are reported with the file and the line.

Axis legend: N samples.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.data.datasets.folder import IMAGENET_MEAN, IMAGENET_STD, LARGEST_VIEW
from selfsup_xbn.errors import UserError
from selfsup_xbn.utils.files import read_bytes

Count = tuple[int, int]
"""Number of images and number of classes of a split."""


class Sample(NamedTuple):
    """An image of a data set.

    Attributes:
        where: The position of the annotation, for error messages.
        file: The path of the image.
        label: The class.
        box: The box (x1, y1, x2, y2) to crop, in pixels. ``None`` for the whole image.
    """

    where: str
    file: str
    label: int | str
    box: Sequence[int] | None = None


def data_folder(name: str, path: str, root: str) -> Path:
    """Return the folder of a data set.

    Args:
        name: The name of the data set.
        path: The folder that the user specified, or "" for the folder ``name`` in ``root``.
        root: The folder of all data sets.

    Raises:
        UserError: If the folder does not exist.
    """
    folder = Path(path) if path else Path(root) / name
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; unpack {name} there, or write {name}:PATH to read the files from another folder"
        )
    return folder


def find_file(file: str, folders: Sequence[Path]) -> Path:
    """Return the path of the file in the first of the folders that contains it.

    Raises:
        UserError: If none of the folders contains it.
    """
    path = next((folder / file for folder in folders if (folder / file).exists()), None)
    if path is None:
        searched = ", ".join(str(folder) for folder in folders)
        raise UserError(f"{file} not found in {searched}; write the path of the unpacked official archive")
    return path


def quoted(value: object) -> str:
    """Return the value for an error message: on one line, and shortened to about 80 characters."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return repr(text) if isinstance(value, str) else text


def read_content(file: Path, remedy: str = "unpack the official archive again") -> bytes:
    """Return the bytes of an annotation file.

    Args:
        file: The file.
        remedy: The advice of the error message.

    Raises:
        UserError: If the file is missing, cannot be read or is not a regular file.
    """
    try:
        return read_bytes(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing; {remedy}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error


def read_lines(file: Path, remedy: str = "unpack the official archive again") -> list[str]:
    """Return the lines of a text file, without blank lines at its end and without a byte order mark.

    Args:
        file: The text file.
        remedy: The advice of the error message for a file that is empty or cannot be read.

    Raises:
        UserError: If the file cannot be read, is empty or is not UTF-8.
    """
    content = read_content(file, remedy)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}:{line}: expected UTF-8 text, got byte {error.object[error.start]:#04x}; save the file as UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"{file}:1: the file is empty; {remedy}")
    return text.rstrip().split("\n")


def read_table(
    file: Path, columns: str, *, numbers: int, header: int = 0, separator: str = r"\s+"
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the position FILE:LINE and the fields of each row of a table in a text file.

    Args:
        file: The text file, with fields separated by blanks.
        columns: The names of the columns, separated by blanks.
        numbers: The number of leading columns that contain non-negative integers of at most nine digits.
        header: The line that contains the names of the columns, counted from 1. 0 for a file without header.
        separator: The regular expression between two fields.

    Raises:
        UserError: If the file cannot be read, its header differs, it has no rows, or a row does not match the columns.
    """
    lines, names = read_lines(file), columns.split()
    if header and (len(lines) < header or lines[header - 1].split() != names):
        line = lines[header - 1] if len(lines) >= header else ""
        raise UserError(f"{file}:{header}: expected the header {columns!r}, got {quoted(line)}")
    if len(lines) == header:
        raise UserError(f"{file}:{header + 1}: expected rows of {columns!r}, got the end of the file")
    fields = [r"(\d{1,9})"] * numbers + [r"(\S+)"] * (len(names) - numbers)
    row = re.compile(r"\s*" + separator.join(fields) + r"\s*", re.ASCII)
    for number, line in enumerate(lines[header:], header + 1):
        match = row.fullmatch(line)
        if not match:
            kinds = f" with integers in the first {numbers}" if numbers else ""
            raise UserError(f"{file}:{number}: expected the columns {columns!r}{kinds}, got {quoted(line)}")
        yield f"{file}:{number}", match.groups()


class ImageFolders:
    """Find image files in one or more base folders.

    Each directory is listed once, because a system call for each of 120,000 files would take most of the time.

    Args:
        *bases: The base folders. A file is taken from the first of them that contains it.
    """

    def __init__(self, *bases: Path) -> None:
        self.bases = bases
        self._positions: dict[str, str] = {}
        self._listed: dict[str, dict[str, str]] = {}

    def find(self, where: str, path: str) -> str:
        """Return the path of an image file.

        Args:
            where: The position of the annotation, for error messages.
            path: The path relative to the base folders, with forward slashes.

        Raises:
            UserError: If the path leads out of the base folders, was passed before, or does not exist.
        """
        first = self._positions.setdefault(path, where)
        if first is not where:
            raise UserError(f"{where}: image {quoted(path)} is already listed in {first}; remove one of the two")
        name = path.rpartition("/")[2]
        folder = path[: len(path) - len(name)]
        if folder not in self._listed:
            self._listed[folder] = self._files(where, folder)
        file = self._listed[folder].get(name)
        if file is None:
            searched = " or ".join(str(base) for base in self.bases)
            raise UserError(f"{where}: image {quoted(path)} not found in {searched}; unpack the images there")
        return file

    def _files(self, where: str, folder: str) -> dict[str, str]:
        """Return the files in a folder by name. The folder is relative to the bases, as "a/b/", or "" for a base."""
        parts = folder.split("/")[:-1]
        if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
            raise UserError(f"{where}: expected a path inside {self.bases[0]}, got {quoted(folder)}")
        paths = [os.path.join(base, folder) for base in reversed(self.bases)]
        return {name: path + name for path in paths for name in file_names(path)}


def file_names(folder: str | Path) -> set[str]:
    """Return the names of the files in a folder, or an empty set if the folder does not exist."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return set()


def retrieval_data(
    name: str, parts: Mapping[str, Sequence[Sample]], official: Mapping[str, Count], notes: Sequence[str] = ()
) -> ImageData:
    """Return a retrieval data set of image files, with views of 224 x 224 pixels and ImageNet's normalization.

    The labels number the sorted training classes first and then the sorted test classes.

    Args:
        name: The specification of the data set.
        parts: The samples of the training set and of the test set, or of the training set, the queries and the gallery.
        official: The numbers of images and classes of each part in the official data set.
        notes: Additional lines for the user.

    Raises:
        UserError: If a part is empty, or a test class is also a training class.
    """
    for part, samples in parts.items():
        if not samples:
            raise UserError(
                f"{name}: expected at least one {part} image in the annotations, got none; "
                "unpack the official archive again"
            )
    numbers = _numbered(*parts.values())
    train, test, *gallery = (_split(samples, numbers) for samples in parts.values())
    counts = [
        count_note(part, split, official[part]) for part, split in zip(parts, (train, test, *gallery), strict=True)
    ]
    return ImageData(
        name=name,
        train=train,
        test=test,
        gallery=gallery[0] if gallery else None,
        classes=[str(label) for label in numbers],
        disjoint=True,
        image_size=LARGEST_VIEW,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        notes=(*counts, *notes),
    )


def _numbered(train: Sequence[Sample], *rest: Sequence[Sample]) -> dict[int | str, int]:
    known = {sample.label for sample in train}
    for sample in chain(*rest):
        if sample.label in known:
            raise UserError(
                f"{sample.where}: expected a class that the training set does not contain, got {sample.label}"
            )
    new = {sample.label for sample in chain(*rest)}
    return {label: number for number, label in enumerate([*sorted(known), *sorted(new)])}


def _split(samples: Sequence[Sample], numbers: Mapping[int | str, int]) -> Split:
    boxes = [sample.box for sample in samples if sample.box is not None]
    return Split(
        labels=torch.tensor([numbers[sample.label] for sample in samples]),
        paths=[sample.file for sample in samples],
        boxes=torch.tensor(boxes) if boxes else None,
    )


def classes_in(labels: Int64[Tensor, "N"]) -> int:
    """Return the number of distinct labels."""
    return len(labels.unique())


def count_note(part: str, split: Split, official: Count) -> str:
    """Return a line that compares the counts of images and classes with the official ones; a warning if they differ."""
    count = len(split), classes_in(split.labels)
    actual, expected = (f"{images:,} images of {classes:,} classes" for images, classes in (count, official))
    if count == official:
        return f"{part}: {actual}, as in the official data set"
    return f"warning: {part}: {actual}, but the official data set has {expected}"
