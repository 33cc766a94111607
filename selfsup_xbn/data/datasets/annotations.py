"""What the retrieval benchmarks share: checked rows of annotation files, a search for images, numbered classes.

Every complaint about a row names the file and the line.

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

Count = tuple[int, int]
"""Images and classes of one part of a data set."""


class Sample(NamedTuple):
    """One image of a data set; ``where`` is the place that mentions it, for complaints."""

    where: str
    file: str
    label: int | str
    box: Sequence[int] | None = None


def home(name: str, path: str, root: str) -> Path:
    """The folder of data set ``name``: ``path``, or without one the folder ``name`` under ``root``.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(path) if path else Path(root) / name
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; unpack {name} there, or write {name}:PATH to read the files from another folder"
        )
    return folder


def find_file(file: str, folders: Sequence[Path]) -> Path:
    """``file`` in the first of the ``places`` that has it.

    Raises:
        UserError: none has it.
    """
    path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if path is None:
        searched = ", ".join(str(folder) for folder in folders)
        raise UserError(f"{file} not found in {searched}; write the path of the unpacked official archive")
    return path


def shown(value: object) -> str:
    """``value`` as it is quoted in a message of one line."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return repr(text) if isinstance(value, str) else text


def read_lines(file: Path) -> list[str]:
    """The lines of a text file; blank ones at its end do not count.

    Raises:
        UserError: it cannot be read, is empty, or is not UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); unpack the official archive again") from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}:{line}: expected UTF-8 text, got byte {content[error.start]:#04x}; save the file as UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"{file}:1: the file is empty; unpack the official archive again")
    return text.rstrip().split("\n")


def read_table(file: Path, columns: str, *, numbers: int, header: int = 0) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where each row is (FILE:LINE), and its fields.

    Args:
        columns: their names, as line ``header`` of the file has them.
        numbers: so many columns, from the first on, hold whole numbers of at most nine digits.
        header: 0 where the file names no columns.

    Raises:
        UserError: as ``read_lines``; another header; no rows; a row with other fields.
    """
    lines, names = read_lines(file), columns.split()
    if header and (len(lines) < header or lines[header - 1].split() != names):
        line = lines[header - 1] if len(lines) >= header else ""
        raise UserError(f"{file}:{header}: expected the header {columns!r}, got {shown(line)}")
    if len(lines) == header:
        raise UserError(f"{file}:{header + 1}: expected rows of {columns!r}, got the end of the file")
    fields = [r"(\d{1,9})"] * numbers + [r"(\S+)"] * (len(names) - numbers)
    row = re.compile(r"\s*" + r"\s+".join(fields) + r"\s*", re.ASCII)
    for number, line in enumerate(lines[header:], header + 1):
        match = row.fullmatch(line)
        if not match:
            kinds = f" with integers in the first {numbers}" if numbers else ""
            raise UserError(f"{file}:{number}: expected the columns {columns!r}{kinds}, got {shown(line)}")
        yield f"{file}:{number}", match.groups()


class ImageFolders:
    """The images below one or several ``bases``. A directory is listed once, however many of its images are asked for:
    a look at each of 120,000 files would take longer than all the rest.
    """

    def __init__(self, *bases: Path) -> None:
        self.bases = bases
        self._mentioned: dict[str, str] = {}
        self._listed: dict[str, dict[str, str]] = {}

    def find(self, where: str, path: str) -> str:
        """The file that ``where`` calls ``path``, relative to the bases and with forward slashes.

        Raises:
            UserError: it leads out of the bases, was asked for before, or does not exist.
        """
        first = self._mentioned.setdefault(path, where)
        if first is not where:
            raise UserError(f"{where}: image {shown(path)} is already listed in {first}; remove one of the two")
        name = path.rpartition("/")[2]
        folder = path[: len(path) - len(name)]
        if folder not in self._listed:
            self._listed[folder] = self._files(where, folder)
        file = self._listed[folder].get(name)
        if file is None:
            searched = " or ".join(str(base) for base in self.bases)
            raise UserError(f"{where}: image {shown(path)} not found in {searched}; unpack the images there")
        return file

    def _files(self, where: str, folder: str) -> dict[str, str]:
        """The files in a folder ("a/b/"; "": a base itself) by name, each of the first base that has it."""
        parts = folder.split("/")[:-1]
        if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
            raise UserError(f"{where}: expected a path inside {self.bases[0]}, got {shown(folder)}")
        places = [os.path.join(base, folder) for base in reversed(self.bases)]
        return {name: place + name for place in places for name in file_names(place)}


def file_names(folder: str | Path) -> set[str]:
    """Names of the files in a folder; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return set()


def retrieval_data(
    name: str, parts: Mapping[str, Sequence[Sample]], official: Mapping[str, Count], notes: Sequence[str] = ()
) -> ImageData:
    """Photos on disk, seen at 224 x 224. Labels number the sorted training classes, then the sorted test classes.

    Args:
        name: the specification that the user wrote.
        parts: the samples of "train", then of the test set, or of the queries and the gallery.
        official: what each part should hold.
        notes: further lines for the user.

    Raises:
        UserError: a part is empty, or a test class is a training class too.
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
    """How many different labels there are."""
    return len(labels.unique())


def count_note(part: str, split: Split, official: Count) -> str:
    """One line for the user: the images and classes found beside the ``official`` ones; a warning where they differ."""
    count = len(split), classes_in(split.labels)
    actual, expected = (f"{images:,} images of {classes:,} classes" for images, classes in (count, official))
    if count == official:
        return f"{part}: {actual}, as in the official data set"
    return f"warning: {part}: {actual}, but the official data set has {expected}"
