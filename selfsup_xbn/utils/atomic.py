"""Atomic replacement of files, which is safe if the process is killed or the disk is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from selfsup_xbn.errors import UserError
from selfsup_xbn.utils.files import open_regular

TEMPORARY = ".tmp"
RESUME = "free disk space, and continue with --resume"
"""Remedy in the error message for a file of a run that could not be written."""


@contextmanager
def replacing(path: Path, remedy: str = RESUME) -> Iterator[BinaryIO]:
    """Open a new file that replaces ``path`` when the block ends without an exception.

    Readers of ``path`` always see the complete old file or the complete new file. A link in the place of the temporary
    file is deleted, not followed.

    Args:
        path: File to replace.
        remedy: How to mend an error, for the error message.

    Yields:
        New file, open for writing and reading.

    Raises:
        UserError: The file could not be written. The old file is unchanged, and the new file is deleted.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with writing(path, remedy):
        try:
            with suppress(FileNotFoundError):
                temporary.unlink()
            with open_regular(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, "w+b") as file:
                yield file
                sync(file)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


def save(state: Any, file: BinaryIO) -> None:
    """Save a state with ``torch.save``, and raise the ``OSError`` that ``torch.save`` hides in a ``RuntimeError``.

    Args:
        state: Object to save.
        file: File to write to.

    Raises:
        OSError: The file could not be written.
    """
    import torch

    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


@contextmanager
def writing(path: Path, remedy: str = RESUME) -> Iterator[None]:
    """Convert an ``OSError`` of the block to a ``UserError`` of one line.

    Args:
        path: File that the block writes.
        remedy: How to mend an error, for the error message.

    Raises:
        UserError: The block raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): {remedy}") from None


def check_creatable(folder: Path) -> None:
    """Check that a folder can be created, or that files can be created in it. Nothing remains.

    Args:
        folder: Folder that may exist.

    Raises:
        UserError: The path is not a directory, or the system refuses it.
    """
    with writing(folder, "choose another --out"):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: choose another --out")
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        with TemporaryDirectory(dir=(folder, *folder.parents)[len(missing)]) as inside:
            for path in missing[:1]:
                Path(inside, path.name).mkdir()


def open_to_append(path: Path) -> BinaryIO:
    """Open a regular file for appending, and create it if it does not exist. A link is not followed.

    Raises:
        OSError: The file is a link or not a regular file, or cannot be opened.
    """
    return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), "ab")


def sync(file: BinaryIO) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the entries of a directory to the disk, if the system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
