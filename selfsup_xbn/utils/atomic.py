"""Files that are whole or not there: a process may be killed, or the disk be full, at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from selfsup_xbn.errors import UserError

TEMPORARY = ".tmp"
RESUME = "make room there, and go on with --resume"
"""What to do about a file of a run that cannot be written."""


@contextmanager
def replacing(path: Path, cure: str = RESUME) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that takes the place of ``path`` once all of it is on the disk.

    A reader of ``path`` finds the old file or the new one, even after the writing process was killed.

    Raises:
        UserError: it cannot be written, with the cure; the old file is as it was, and nothing is left beside it.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with writing(path, cure):
        try:
            with open(temporary, "w+b") as file:
                yield file
                sync(file)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


def save(state: Any, file: BinaryIO) -> None:
    """``torch.save``, whose writer hides the file's own complaint.

    Raises:
        OSError: the file's.
    """
    import torch

    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


@contextmanager
def writing(path: Path, cure: str = RESUME) -> Iterator[None]:
    """Within, an error of the file system is a fault of one line that names ``path`` and the cure.

    Raises:
        UserError: there was one.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): {cure}") from None


def sync(file: BinaryIO) -> None:
    """Waits until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until new names in the folder are on the disk; a system that cannot do that is left alone."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
