"""A table of numbers that was read from many small files, kept in one file as long as these stay what they were.

The cache is a NumPy archive, never a pickle: it may lie in a folder that others can write to. Beside the table it holds
a fingerprint of the files' names, sizes and times of change.

Axis legend: N rows, W columns.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

FORMAT = "1"
"""Part of the fingerprint: change it with the meaning of a table."""


class Source(NamedTuple):
    """The files that a table comes from: their names in order, and a fingerprint of their state."""

    folder: Path
    names: list[str]
    fingerprint: str


def source_of(folder: Path, ending: str) -> Source:
    """The files of ``folder`` with this ending, by name.

    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        states = sorted(
            (entry.name, status.st_size, status.st_mtime_ns)
            for entry in entries
            if entry.name.endswith(ending) and not entry.name.startswith(".") and (status := entry.stat())
        )
    digest = hashlib.sha256(repr((FORMAT, states)).encode(errors="surrogateescape")).hexdigest()
    return Source(folder, [name for name, *_ in states], digest)


def cached(
    files: Source, width: int, read: Callable[[], Int32[np.ndarray, "N W"]]
) -> tuple[Int32[np.ndarray, "N W"], str]:
    """The table of W = ``width`` columns, from the cache or else by ``read()``, and a line that says so if it was read.

    The cache is beside the folder of the files, or in the user's cache folder where that cannot be written.
    """
    paths = _cache_paths(files.folder)
    for path in paths:
        table = _load(path, files, width)
        if table is not None:
            return table, ""
    stale = [str(path) for path in paths if path.exists()]
    table = read()
    cache = next(
        (f"cached in {path}" for path in paths if _store(path, files, table)), "not cached: no folder is writable"
    )
    reason = f"the cache {stale[0]} is damaged or out of date; " if stale else ""
    return table, f"{reason}read {len(files.names):,} files of {files.folder}, {cache}"


def _cache_paths(folder: Path) -> tuple[Path, Path]:
    """Beside the folder; in the user's cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "selfsup_xbn")
    own_name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return folder.with_name(f"{folder.name}.selfsup_xbn.npz"), user / f"{own_name}.npz"


def _load(place: Path, files: Source, width: int) -> Int32[np.ndarray, "N W"] | None:
    try:
        with np.load(place, allow_pickle=False) as archive:
            fingerprint, table = str(archive["fingerprint"]), archive["table"]
    except Exception:  # broken bytes make NumPy and zipfile raise nearly anything
        return None
    fits = table.dtype == np.int32 and table.ndim == 2 and table.shape[1] == width
    return table if fits and fingerprint == files.fingerprint else None


def _store(place: Path, files: Source, table: Int32[np.ndarray, "N W"]) -> bool:
    """Writes another file and renames it, so that no reader meets a half-written one."""
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            np.savez_compressed(file, fingerprint=np.array(files.fingerprint), table=table)
        os.replace(temporary, place)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return False
    return True
