"""Lists of image files: a CSV or TSV file with a header.

The columns are ``path``, relative to the folder of the list, and optionally ``label`` and ``split``. The values of
``split`` are those of the folders of ``folder:PATH``: train, val or validation, test or query, gallery. Without the
column all images train, until ``--split-classes`` divides the classes. Other columns are not used.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from selfsup_xbn.data.base import ImageData
from selfsup_xbn.data.datasets.annotations import file_names, quoted, read_lines
from selfsup_xbn.data.datasets.folder import NO_CLASS, PARTS, Classes, check_parts, image_data
from selfsup_xbn.errors import UserError, near


def load(name: str, path: str, *, root: str, cache_bytes: int, workers: int) -> ImageData:
    """Load the images of a list.

    Args:
        name: The name of the data set.
        path: The CSV or TSV file.
        root: Not used.
        cache_bytes: The most bytes that the decoded images may take in memory.
        workers: The number of processes that read files.

    Raises:
        UserError: If the list is malformed, an image is missing or listed twice, or a file cannot be read.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{file}: expected a CSV or TSV file, got a folder; write folder:{path}")
    parts: dict[str, Classes] = {}
    for split, label, image in _rows(file):
        parts.setdefault(split, {}).setdefault(label, []).append(image)
    if not parts:
        raise UserError(f"{file}: expected a line per image below the header, got none")
    check_parts(list(parts), str(file))
    ordered = {PARTS[split]: dict(sorted(files.items(), key=_order)) for split, files in parts.items()}
    return image_data(f"{name}:{path}", ordered, cache_bytes, workers)


def _order(item: tuple[str, object]) -> tuple[bool, int, str]:
    """Return the key that sorts numbers by value, before other labels."""
    number = int(item[0]) if item[0].isdecimal() else -1
    return number < 0, number, item[0]


def _rows(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the split, the label and the path of each image."""
    lines = read_lines(file, "write a header path,label and a line per image")
    table = csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ",", strict=True)
    columns = _columns(file, [name.strip().lower() for name in next(table)])
    files, listed = lru_cache(None)(file_names), dict[str, str]()
    try:
        for row in table:
            where = f"{file}:{table.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) < len(columns):
                raise UserError(f"{where}: expected {len(columns)} fields ({', '.join(columns)}), got {len(row)}")
            values = {name: cell.strip() for name, cell in zip(columns, row, strict=False)}
            image = os.path.join(file.parent, values["path"])
            if os.path.basename(image) not in files(os.path.dirname(image)):
                raise UserError(f"{where}: image {quoted(values['path'])} not found in {file.parent}")
            if (first := listed.setdefault(os.path.normpath(image), where)) is not where:
                raise UserError(f"{where}: image {quoted(values['path'])} is already listed in {first}")
            yield _split(where, values.get("split", "train")), _label(where, values), image
    except csv.Error as error:
        raise UserError(f"{file}:{table.line_num}: not a line of a CSV file ({error})") from error


def _columns(file: Path, names: Sequence[str]) -> Sequence[str]:
    if "path" not in names or len(set(names)) < len(names):
        header = ",".join(names)
        raise UserError(
            f"{file}:1: expected a header with the columns path, label and, if wanted, split, each once, "
            f"got {quoted(header)}" + "; separate them by commas or tabs" * (";" in header)
        )
    return names


def _split(where: str, value: str) -> str:
    if value.lower() not in PARTS:
        raise UserError(
            f"{where}: expected a split out of {', '.join(PARTS)}, got {quoted(value)}{near(value.lower(), PARTS)}"
        )
    return value.lower()


def _label(where: str, values: dict[str, str]) -> str:
    if values.get("label") == "":
        raise UserError(f"{where}: expected a label, got none")
    return values.get("label", NO_CLASS)
