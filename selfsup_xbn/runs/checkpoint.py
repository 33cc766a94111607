"""Checkpoints: written whole or not at all, known when damaged, read without running code.

The newest is ``checkpoint.pt``; the ones before it are ``checkpoint-1.pt``, ``checkpoint-2.pt`` and so on. Each is what
``torch.save`` writes, a zip archive, with a SHA-256 of all that comes before as the archive's comment. So any program
reads them with ``torch.load``, which itself does not look at the checksums of a zip archive.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from selfsup_xbn.errors import UserError
from selfsup_xbn.utils import atomic
from selfsup_xbn.utils.safe_loading import read_values

NAME, BEST = "checkpoint.pt", "best.pt"
OLDER = re.compile(r"checkpoint-([1-9]\d{0,5})\.pt")
ASIDE = ".damaged"

COMMENT_LENGTH = hashlib.sha256().digest_size.to_bytes(2, "little")  # the last field of a zip archive, then the comment
SEAL_BYTES = len(COMMENT_LENGTH) + hashlib.sha256().digest_size
BLOCK = 2**20


def save(state: dict[str, Any], folder: Path, name: str = NAME, keep: int = 1) -> None:
    """Writes a checkpoint to a temporary file, flushes it to the disk, and renames it.

    With ``keep`` above 1 the checkpoint of that name becomes the one before, and so on. At each moment at least one
    whole checkpoint is there, if there was one.

    Raises:
        UserError: it cannot be written, because the disk is full for example; the old ones are as they were.
    """
    with atomic.replacing(folder / name) as file:
        atomic.save(state, file)
        end = file.tell() - len(COMMENT_LENGTH)
        seal = _seal(file, end)
        file.seek(end)
        file.write(seal)
        atomic.sync(file)
        if name == NAME:
            _make_room(folder, keep)


def exists(folder: Path) -> bool:
    """Whether the folder holds a checkpoint to go on from, whole or damaged."""
    return bool(_newest_first(folder))


def load(folder: Path, name: str = NAME) -> dict[str, Any]:
    """The state in a run's checkpoint, on the CPU; a pickle that would run code is refused.

    Where ``checkpoint.pt`` is damaged or missing the newest whole one before it is taken, with a warning.

    Raises:
        UserError: there is none that is whole, or it is none of this package's.
    """
    paths = _newest_first(folder) if name == NAME else [folder / name]
    path = next((path for path in paths if is_whole(path)), None)
    if path is None and paths:
        raise UserError(
            f"{paths[0]} is damaged, or none of this program's (its checksum is wrong), and no whole one is beside it: "
            "restore it, or start over with --overwrite"
        )
    if path is None:
        raise UserError(f"no checkpoint {folder / name}; give the folder of a run")
    if path != paths[0]:
        warnings.warn(f"{paths[0]} is damaged (its checksum is wrong): {path.name} is used in its place", stacklevel=2)
    return _read(path)


def set_damaged_aside(folder: Path) -> None:
    """Renames damaged checkpoints newer than the newest whole one, so that no whole one is dropped to keep them."""
    for path in _newest_first(folder):
        if is_whole(path):
            return
        os.replace(path, path.with_name(path.name + ASIDE))


def is_whole(path: Path) -> bool:
    """Whether the checkpoint is as it was written, to the last bit.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END) - SEAL_BYTES
            if end < 0:
                return False
            file.seek(end)
            return file.read() == _seal(file, end)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; give the folder of a run") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        state = read_values(path)
    except Exception as error:  # what is no pickle of tensors can make the reader raise nearly anything
        kind = type(error).__name__
        raise UserError(f"cannot read {path} ({kind}): it holds more than tensors and plain values") from None
    known = isinstance(state, dict) and "method" in state and "config" in state
    if not known or type(state.get("log_bytes", 0)) is not int:
        raise UserError(f"{path} is no checkpoint of this program: give the folder of a run, or --weights FILE")
    return state


def _seal(file: BinaryIO, end: int) -> bytes:
    """The archive's comment for its first ``end`` bytes, and before it the comment's length."""
    digest, left = hashlib.sha256(), end
    file.seek(0)
    while left and (block := file.read(min(left, BLOCK))):
        digest.update(block)
        left -= len(block)
    return COMMENT_LENGTH + digest.digest()


def _older(folder: Path) -> dict[int, Path]:
    """The checkpoints before the newest by their numbers, which grow with age."""
    matches = {path: OLDER.fullmatch(path.name) for path in folder.glob("checkpoint-*.pt")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def _newest_first(folder: Path) -> list[Path]:
    newest = folder / NAME
    return [newest] * newest.exists() + list(_older(folder).values())


def _make_room(folder: Path, keep: int) -> None:
    """Each of the last ``keep`` - 1 checkpoints takes the place of the one before it; older ones are removed."""
    for number in range(keep - 1, 0, -1):
        newer = folder / (f"checkpoint-{number - 1}.pt" if number > 1 else NAME)
        if newer.exists():
            os.replace(newer, folder / f"checkpoint-{number}.pt")
    for number, path in _older(folder).items():
        if number >= keep:
            path.unlink()
