"""Cache of a table of numbers that is read from many small files.

The cache is a NumPy archive without pickled objects, because it may be in a folder that other users can write to. It
contains the table and a fingerprint of the names, sizes and modification times of the source files, and is valid while
the fingerprint does not change.

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

from selfsup_xbn.utils.files import open_regular, unpacked_bytes

FORMAT = "2"
"""Version of the format, a part of the fingerprint. A change of the columns needs a new version."""

HEADER_BYTES = 4096
"""More than the bytes of the archive that are not rows of the table: the fingerprint and the headers of both arrays."""


class Source(NamedTuple):
    """The source files of a table.

    Attributes:
        folder: The folder of the files.
        names: The sorted names of the files.
        fingerprint: A hash of the names, sizes and modification times of the files.
        size: The number of bytes of all files.
    """

    folder: Path
    names: list[str]
    fingerprint: str
    size: int


def source_of(folder: Path, ending: str) -> Source:
    """Return the files in a folder whose names have a given ending and do not start with a dot.

    Raises:
        OSError: If the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        states = sorted(
            (entry.name, status.st_size, status.st_mtime_ns)
            for entry in entries
            if entry.name.endswith(ending) and not entry.name.startswith(".") and (status := entry.stat())
        )
    digest = hashlib.sha256(repr((FORMAT, states)).encode(errors="surrogateescape")).hexdigest()
    return Source(folder, [name for name, *_ in states], digest, sum(size for _, size, _ in states))


def cached(
    files: Source, width: int, read: Callable[[], Int32[np.ndarray, "N W"]]
) -> tuple[Int32[np.ndarray, "N W"], str]:
    """Return a table from its cache, or read it and write the cache.

    The cache is next to the folder of the source files or, if that is not writable, in the user's cache folder.

    Args:
        files: The source files.
        width: The number of columns W.
        read: A function that reads the table from the source files.

    Returns:
        The table, and a note for the user if the table was read, otherwise "".
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
    """Return the path next to the folder and the path in the user's cache folder."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "selfsup_xbn")
    folder_hash = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return folder.with_name(f"{folder.name}.selfsup_xbn.npz"), user_cache / f"{folder_hash}.npz"


def _load(path: Path, files: Source, width: int) -> Int32[np.ndarray, "N W"] | None:
    try:
        with open_regular(path) as file:
            # A row is shorter than its text in the source files. A damaged archive may unpack to any size.
            if unpacked_bytes(file) > files.size + HEADER_BYTES:
                return None
            with np.load(file, allow_pickle=False) as archive:
                fingerprint, table = str(archive["fingerprint"]), archive["table"]
    except Exception:  # NumPy and zipfile raise many types of exceptions for broken files
        return None
    valid = table.dtype == np.int32 and table.ndim == 2 and table.shape[1] == width
    return table if valid and fingerprint == files.fingerprint else None


def _store(path: Path, files: Source, table: Int32[np.ndarray, "N W"]) -> bool:
    """Write and rename a temporary file, so that no reader sees an incomplete one; return whether this succeeded."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            np.savez_compressed(file, fingerprint=np.array(files.fingerprint), table=table)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return False
    return True
