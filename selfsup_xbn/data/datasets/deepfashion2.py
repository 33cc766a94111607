"""DeepFashion2 (Ge et al., 2019), consumer to shop: retrieval of shops' photos of clothes from users' photos.

https://github.com/switchablenorms/DeepFashion2. A JSON file for each image contains its source and its items. The image
of an item is the crop of its ground-truth box. Two items show the same piece of clothing if their pair_id, category_id
and style agree and the style is not 0. The label is this triple.

- Queries: the users' items of style > 0 in the validation set, as in the official evaluation
  (evaluation/evaluation.md). ``recall_at_k`` ignores queries without a match in the gallery.
- Gallery: all shops' items in the validation set. Items of style 0 match no query. The queries have 3,128 labels and
  the gallery has 7,059. The official table has similar proportions: of the 54,910 boxes in the full validation set,
  12,550 are queries and 37,183 are in the gallery, so the others must be users' items of style 0.
- Training: all items of style > 0. The paper does not specify whether its 217,778 boxes "with a valid pair" include
  labels that only users or only shops have. There are 6.9 boxes per label and, on average, 12.7 per identity, so they
  probably do.

Axis legend: N items.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int32
from torch import Tensor
from tqdm import tqdm

from selfsup_xbn.data.base import ImageData
from selfsup_xbn.data.datasets.annotations import (
    Sample,
    data_folder,
    file_names,
    quoted,
    read_content,
    retrieval_data,
)
from selfsup_xbn.data.datasets.table_cache import Source, cached, source_of
from selfsup_xbn.data.images import upright_size
from selfsup_xbn.data.workers import ParallelReader
from selfsup_xbn.errors import UserError, printable

OFFICIAL = {"train": (217_778, 31_517), "query": (12_377, 3_128), "gallery": (36_961, 7_059)}
SOURCES = ("user", "shop")
USER, SHOP = range(2)
COLUMNS = ("file", "source", "pair_id", "category_id", "style", "x1", "y1", "x2", "y2")
ITEM = re.compile(r"item\d+")
LARGEST = 2**31
CHUNK = 500
"""Number of files that a worker reads at a time."""


def load(name: str, path: str, *, root: str, workers: int, **_: object) -> ImageData:
    """Load DeepFashion2 from the folders ``train`` and ``validation``, each with ``image`` and ``annos``.

    The items are cached in one file for each folder, because reading all JSON files and the sizes of all images
    is slow. Boxes are clipped to their images.

    Args:
        name: The name of the data set.
        path: The folder of the data set, or "" for the folder ``name`` in ``root``.
        root: The folder of all data sets.
        workers: The number of processes that read JSON files.

    Raises:
        UserError: If a folder or an image is missing, a JSON file is malformed, or an image with items is not an image.
    """
    folder = data_folder(name, path, root)
    train, validation = (_read_part(folder / part, workers) for part in ("train", "validation"))
    parts = {
        "train": train.samples(train.style > 0),
        "query": validation.samples((validation.source == USER) & (validation.style > 0)),
        "gallery": validation.samples(validation.source == SHOP),
    }
    return retrieval_data(f"{name}:{folder}", parts, OFFICIAL, [*train.notes, *validation.notes])


@dataclass(frozen=True)
class _Part:
    """The non-empty items of the training set or the validation set.

    Attributes:
        folder: The folder of the set.
        stems: The name of each image without its extension.
        table: The values of ``COLUMNS`` for each item.
        notes: Lines for the user.
    """

    folder: Path
    stems: Sequence[str]
    table: Int32[np.ndarray, "N 9"]
    notes: Sequence[str]

    @property
    def source(self) -> Int32[np.ndarray, "N"]:
        return self.table[:, COLUMNS.index("source")]

    @property
    def style(self) -> Int32[np.ndarray, "N"]:
        return self.table[:, COLUMNS.index("style")]

    def samples(self, chosen: Bool[np.ndarray, "N"]) -> list[Sample]:
        # Strings, because pathlib would take most of the time.
        annos, images = f"{self.folder}/annos", f"{self.folder}/image"
        # The label contains the name of the set, because the pair_ids of the two sets may overlap.
        part = self.folder.name
        return [
            Sample(
                f"{annos}/{self.stems[file]}.json",
                f"{images}/{self.stems[file]}.jpg",
                f"{part} {a}-{b}-{c}",
                tuple(box),
            )
            for file, _, a, b, c, *box in self.table[chosen].tolist()
        ]


def _read_part(folder: Path, workers: int) -> _Part:
    try:
        files = source_of(folder / "annos", ".json")
    except OSError as error:
        raise UserError(
            f"{folder / 'annos'}: cannot be listed ({error.strerror}); unpack DeepFashion2 there"
        ) from error
    if not files.names:
        raise UserError(
            f"{folder / 'annos'}: expected JSON files, got none; unpack the annotations of DeepFashion2 there"
        )
    stems = _image_stems(files, folder / "image")
    table, note = cached(files, len(COLUMNS), lambda: _read_all(files, workers))
    filled = table[(table[:, 5] < table[:, 7]) & (table[:, 6] < table[:, 8])]
    notes = [note] if note else []
    if empty := len(table) - len(filled):
        notes.append(f"warning: {folder}: {empty:,} boxes that are empty or outside of their image are ignored")
    return _Part(folder, stems, filled, notes)


def _image_stems(files: Source, images: Path) -> list[str]:
    """Return the name of each image without its extension, and check that the image exists."""
    stems, existing = [name.removesuffix(".json") for name in files.names], file_names(images)
    for stem in stems:
        if f"{stem}.jpg" not in existing:
            raise UserError(f"{files.folder / stem}.json: image {images / stem}.jpg not found; unpack the images there")
    return stems


def _read_all(files: Source, workers: int) -> Int32[np.ndarray, "N 9"]:
    chunks = [[range(first, min(first + CHUNK, len(files.names)))] for first in range(0, len(files.names), CHUNK)]
    read = ParallelReader(_Read(files), min(workers, len(chunks) - 1))
    tables = []
    text = printable(f"reading {files.folder}")
    with tqdm(total=len(files.names), desc=text, unit=" files", disable=not sys.stderr.isatty(), leave=False) as bar:
        for (chunk,), table in zip(chunks, read(chunks), strict=True):
            tables.append(table[0].numpy().copy())  # a copy, because the original keeps a file of shared memory open
            bar.update(len(chunk))
    return np.concatenate(tables)


class _Read:
    """Read the items of a range of files, in a worker process."""

    def __init__(self, files: Source) -> None:
        self.files, self.images = files, files.folder.with_name("image")

    def __call__(self, numbers: range) -> Int32[Tensor, "n 9"]:
        rows = [
            (number, *row)
            for number in numbers
            for row in self._inside(self.files.names[number], read_items(self.files.folder / self.files.names[number]))
        ]
        return torch.tensor(rows, dtype=torch.int32).view(-1, len(COLUMNS))

    def _inside(self, name: str, rows: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        """Yield the rows of a file with their boxes clipped to the image, whose header is read. A box may be empty."""
        if rows:
            limits = upright_size(str(self.images / name.replace(".json", ".jpg"))) * 2
            for *fields, x1, y1, x2, y2 in rows:
                box = (min(max(value, 0), limit) for value, limit in zip((x1, y1, x2, y2), limits, strict=True))
                yield (*fields, *box)


def read_items(file: Path) -> list[tuple[int, ...]]:
    """Return (source, pair_id, category_id, style, x1, y1, x2, y2) of each item of an annotation file.

    The source is 0 for "user" and 1 for "shop". The box is in pixels.

    Raises:
        UserError: If the file is not in the format of DeepFashion2.
    """
    content = _parsed(file)
    if content.get("source") not in SOURCES:
        raise UserError(f'{file}: expected source "user" or "shop", got {quoted(content.get("source"))}')
    shared = SOURCES.index(content["source"]), _integer(str(file), content, "pair_id")
    rows = []
    for key in filter(ITEM.fullmatch, content):
        where, item = f"{file}: {key}", content[key]
        if not isinstance(item, dict):
            raise UserError(f"{where}: expected an object with bounding_box, category_id and style, got {quoted(item)}")
        numbers = _integer(where, item, "category_id"), _integer(where, item, "style")
        rows.append((*shared, *numbers, *_box(where, item.get("bounding_box"))))
    return rows


def _parsed(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_content(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg}); unpack the annotations again") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({quoted(str(error))}); unpack the annotations again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected an object with source, pair_id, item1, ..., got {quoted(content)}")
    return content


def _integer(where: str, values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 0 <= value < LARGEST:
        raise UserError(f"{where}: expected {key} to be an integer from 0 to {LARGEST - 1}, got {quoted(value)}")
    return value


def _box(where: str, box: Any) -> tuple[int, ...]:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_coordinate(value) for value in box):
        raise UserError(f"{where}: expected bounding_box to be [x1, y1, x2, y2] in pixels, got {quoted(box)}")
    return tuple(round(value) for value in box)


def _is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST - 1  # false for nan
