"""DeepFashion2 (Ge et al., 2019), consumer to shop: users' photos of clothes, searched in the photos of shops.

https://github.com/switchablenorms/DeepFashion2. A JSON file for each image names its source and its items; an item is
the crop of its ground-truth box. Two items show the same piece of clothing if pair_id (of the image), category_id and
style agree and style is not 0: that triple is the label.

- Queries: users' items of style > 0 of the validation set, as in the official evaluation (evaluation/evaluation.md).
  Those without a counterpart in the gallery are left out by ``recall_at_k``.
- Gallery: all shops' items of the validation set. Those of style 0 are distractors, which no query matches: the queries
  have 3,128 labels and the gallery 7,059. (The official table has the same proportion: of the 54,910 boxes in the
  unabridged validation set 12,550 are queries and 37,183 are in the gallery; the rest must be users' of style 0.)
- Training: all items of style > 0, users' and shops'. The paper does not say whether its 217,778 boxes "with a valid
  pair" include labels that only one side has; 6.9 boxes a label, where an identity has 12.7 on average, suggest so.

Axis legend: N items.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int32
from torch import Tensor
from tqdm import tqdm

from selfsup_xbn.data.base import ImageData
from selfsup_xbn.data.datasets.annotations import Sample, file_names, home, retrieval_data, shown
from selfsup_xbn.data.datasets.table_cache import Source, cached, source_of
from selfsup_xbn.data.workers import ParallelReader
from selfsup_xbn.errors import UserError

OFFICIAL = {"train": (217_778, 31_517), "query": (12_377, 3_128), "gallery": (36_961, 7_059)}
SOURCES = ("user", "shop")
USER, SHOP = range(2)
COLUMNS = ("file", "source", "pair_id", "category_id", "style", "x1", "y1", "x2", "y2")
ITEM = re.compile(r"item\d+")
LARGEST = 2**31
CHUNK = 500
"""Files that a worker reads at a time."""


def load(name: str, path: str, *, root: str, workers: int, **_: object) -> ImageData:
    """``train`` and ``validation``, each with ``image`` and ``annos``. The JSON files are read once, then cached.

    Raises:
        UserError: a folder or an image is missing, or a JSON file is malformed.
    """
    folder = home(name, path, root)
    train, validation = (_read_part(folder / part, workers) for part in ("train", "validation"))
    parts = {
        "train": train.samples(train.style > 0),
        "query": validation.samples((validation.source == USER) & (validation.style > 0)),
        "gallery": validation.samples(validation.source == SHOP),
    }
    return retrieval_data(f"{name}:{folder}", parts, OFFICIAL, [*train.notes, *validation.notes])


@dataclass(frozen=True)
class _Part:
    """The items of the training or validation set that have a pixel, a row each, and lines for the user."""

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
        # Paths are not put together by pathlib, which would take most of the time.
        annos, images = f"{self.folder}/annos", f"{self.folder}/image"
        # Nothing says that the pair_ids of the two sets differ.
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
    stems = _checked(files, folder / "image")
    table, note = cached(files, len(COLUMNS), lambda: _read_all(files, workers))
    filled = table[(table[:, 5] < table[:, 7]) & (table[:, 6] < table[:, 8])]
    notes = [note] if note else []
    if empty := len(table) - len(filled):
        notes.append(f"warning: {folder}: {empty:,} empty boxes are ignored")
    return _Part(folder, stems, filled, notes)


def _checked(files: Source, images: Path) -> list[str]:
    """The images' names without ending; each image is there."""
    stems, there = [name.removesuffix(".json") for name in files.names], file_names(images)
    for stem in stems:
        if f"{stem}.jpg" not in there:
            raise UserError(f"{files.folder / stem}.json: image {images / stem}.jpg not found; unpack the images there")
    return stems


def _read_all(files: Source, workers: int) -> Int32[np.ndarray, "N 9"]:
    chunks = [[range(first, min(first + CHUNK, len(files.names)))] for first in range(0, len(files.names), CHUNK)]
    read = ParallelReader(_Read(files), min(workers, len(chunks) - 1))
    tables = []
    text = f"reading {files.folder}"
    with tqdm(total=len(files.names), desc=text, unit=" files", disable=not sys.stderr.isatty(), leave=False) as bar:
        for (chunk,), table in zip(chunks, read(chunks), strict=True):
            tables.append(table[0].numpy().copy())  # else each would hold on to a file of shared memory
            bar.update(len(chunk))
    return np.concatenate(tables)


class _Read:
    """The items of a range of files, for a worker process."""

    def __init__(self, files: Source) -> None:
        self.files = files

    def __call__(self, numbers: range) -> Int32[Tensor, "n 9"]:
        rows = [
            (number, *row) for number in numbers for row in read_items(self.files.folder / self.files.names[number])
        ]
        return torch.tensor(rows, dtype=torch.int32).view(-1, len(COLUMNS))


def read_items(file: Path) -> list[tuple[int, ...]]:
    """(source, pair_id, category_id, style, x1, y1, x2, y2) of each item of an annotation file; source 0 is "user".

    Raises:
        UserError: it is not as DeepFashion2 documents it.
    """
    content = _parsed(file)
    if content.get("source") not in SOURCES:
        raise UserError(f'{file}: expected source "user" or "shop", got {shown(content.get("source"))}')
    shared = SOURCES.index(content["source"]), _integer(str(file), content, "pair_id")
    rows = []
    for key in filter(ITEM.fullmatch, content):
        where, item = f"{file}: {key}", content[key]
        if not isinstance(item, dict):
            raise UserError(f"{where}: expected an object with bounding_box, category_id and style, got {shown(item)}")
        numbers = _integer(where, item, "category_id"), _integer(where, item, "style")
        rows.append((*shared, *numbers, *_box(where, item.get("bounding_box"))))
    return rows


def _parsed(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg}); unpack the annotations again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({shown(str(error))}); unpack the annotations again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected an object with source, pair_id, item1, ..., got {shown(content)}")
    return content


def _integer(where: str, values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 0 <= value < LARGEST:
        raise UserError(f"{where}: expected {key} to be an integer from 0 to {LARGEST - 1}, got {shown(value)}")
    return value


def _box(where: str, box: Any) -> tuple[int, ...]:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_coordinate(value) for value in box):
        raise UserError(f"{where}: expected bounding_box to be [x1, y1, x2, y2] in pixels, got {shown(box)}")
    return tuple(round(value) for value in box)


def _is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST - 1  # false for nan
