"""Checkpoints that are written atomically, verified by a checksum, and loaded without executing code.

The newest checkpoint is ``checkpoint.pt``; previous ones are ``checkpoint-1.pt``, ``checkpoint-2.pt`` and so on. A
checkpoint is a zip archive of ``torch.save`` whose comment is the SHA-256 of all bytes before the comment. Any program
can read it with ``torch.load``, which does not verify the checksums of a zip archive itself. The checkpoint of
a run contains the SHA-256 of its ``metrics.jsonl`` at that time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from selfsup_xbn.errors import UserError, printable
from selfsup_xbn.utils import atomic
from selfsup_xbn.utils.files import open_regular
from selfsup_xbn.utils.safe_loading import read_values

NAME, BEST = "checkpoint.pt", "best.pt"
OLDER = re.compile(r"checkpoint-([1-9]\d{0,5})\.pt")
DAMAGED = ".damaged"

COMMENT_LENGTH = hashlib.sha256().digest_size.to_bytes(2, "little")  # last field of a zip archive before the comment
CHECKSUM_BYTES = len(COMMENT_LENGTH) + hashlib.sha256().digest_size
SEAL_BYTES = hashlib.sha256().digest_size
BLOCK = 2**20


def save(state: dict[str, Any], folder: Path, name: str = NAME, keep: int = 1) -> None:
    """Write a checkpoint atomically.

    The previous ``checkpoint.pt`` is renamed to ``checkpoint-1.pt`` and so on. If the folder has an intact checkpoint,
    it has one at any moment of the call.

    Args:
        state: State of the run.
        folder: Run folder.
        name: File name. Only ``checkpoint.pt`` keeps previous checkpoints.
        keep: Number of checkpoints to keep, including the new one.

    Raises:
        UserError: The file could not be written, for example because the disk is full. Existing checkpoints are kept.
    """
    with atomic.replacing(folder / name) as file:
        atomic.save(state, file)
        end = file.tell() - len(COMMENT_LENGTH)
        checksum = _checksum(file, end)
        file.seek(end)
        file.write(checksum)
        atomic.sync(file)
        if name == NAME:
            _rotate(folder, keep)


def exists(folder: Path) -> bool:
    """Return whether the folder has a checkpoint to resume from, intact or damaged."""
    return bool(newest_first(folder))


def load(folder: Path, name: str = NAME) -> dict[str, Any]:
    """Load the state of a checkpoint to the CPU without executing code.

    Args:
        folder: Run folder.
        name: File name.

    Raises:
        UserError: There is no intact checkpoint, or the file was not written by this package.
    """
    return read(newest(folder, name))


def newest(folder: Path, name: str = NAME) -> Path:
    """Return the path of an intact checkpoint.

    If ``checkpoint.pt`` is missing or damaged, it is the newest intact checkpoint. Damaged ones cause a warning.

    Args:
        folder: Run folder.
        name: File name.

    Raises:
        UserError: There is no intact checkpoint.
    """
    paths = newest_first(folder) if name == NAME else [folder / name]
    path = next((path for path in paths if is_intact(path)), None)
    if path is None and paths:
        raise UserError(
            f"{paths[0]} is damaged or not a checkpoint of this program (the checksum does not match), and there is no "
            "other checkpoint: restore it, or start a new run with --overwrite"
        )
    if path is None:
        raise UserError(f"expected a run folder, but there is no checkpoint {folder / name}")
    if path != paths[0]:
        message = f"{paths[0]} is damaged (the checksum does not match): using {path.name} instead"
        warnings.warn(printable(message), stacklevel=2)
    return path


def has_intact(folder: Path) -> bool:
    """Return whether the folder has an intact checkpoint, which only this program writes."""
    with contextlib.suppress(UserError):  # a file that cannot be read
        return any(is_intact(path) for path in newest_first(folder))
    return False


def covered_log(folder: Path) -> tuple[int, str]:
    """Return the number of bytes of ``metrics.jsonl`` that the newest intact checkpoint covers, and their SHA-256.

    The number is 0 and the checksum is ``""`` if there is no such checkpoint, or an older version wrote it.
    """
    try:
        path = next((path for path in newest_first(folder) if is_intact(path)), None)
        state = read(path, lazily=True) if path else {}
    except UserError:  # reported by ``load``
        return 0, ""
    return (state["log_bytes"], state["log_sha256"]) if "log_sha256" in state else (0, "")


def rename_damaged(folder: Path) -> None:
    """Rename the damaged checkpoints that are newer than the newest intact one.

    Otherwise ``save`` would delete the intact checkpoint and keep the damaged ones.
    """
    for path in newest_first(folder):
        if is_intact(path):
            return
        os.replace(path, path.with_name(path.name + DAMAGED))


def is_intact(path: Path) -> bool:
    """Return whether the checksum of a checkpoint matches.

    Raises:
        UserError: The file does not exist or cannot be read.
    """
    try:
        with open_regular(path) as file:
            end = file.seek(0, os.SEEK_END) - CHECKSUM_BYTES
            if end < 0:
                return False
            file.seek(end)
            return file.read() == _checksum(file, end)
    except FileNotFoundError:
        raise UserError(f"expected a run folder, but there is no checkpoint {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read(source: Path | bytes, *, lazily: bool = False) -> dict[str, Any]:
    """Load the state of a checkpoint to the CPU without executing code and without verifying its checksum.

    Args:
        source: Path, or the content of the file.
        lazily: Whether to map the tensors of a path into memory, so that only those that are used are read.

    Raises:
        UserError: The file was not written by this package.
    """
    path = source if isinstance(source, Path) else "the checkpoint"
    try:
        state = read_values(io.BytesIO(source) if isinstance(source, bytes) else source, lazily)
    except Exception as error:  # invalid files make torch.load raise exceptions of many types
        kind = type(error).__name__
        raise UserError(f"cannot read {path} ({kind}): expected tensors and plain values only") from None
    known = isinstance(state, dict) and "method" in state and "config" in state
    if not known or type(state.get("log_bytes", 0)) is not int or type(state.get("log_sha256", "")) is not str:
        raise UserError(
            f"{path} is not a checkpoint of this program: expected a run folder, or a file as --weights FILE"
        )
    return state


def seal(path: Path) -> str:
    """Return the checksum that a checkpoint states, in hexadecimal digits, or ``""`` if the file cannot be read."""
    try:
        with open_regular(path) as file:
            file.seek(-SEAL_BYTES, os.SEEK_END)
            return file.read().hex()
    except OSError:
        return ""


def _checksum(file: BinaryIO, end: int) -> bytes:
    """Return the length field and the comment of the archive: the SHA-256 of its first ``end`` bytes."""
    digest, remaining = hashlib.sha256(), end
    file.seek(0)
    while remaining and (block := file.read(min(remaining, BLOCK))):
        digest.update(block)
        remaining -= len(block)
    return COMMENT_LENGTH + digest.digest()


def _older(folder: Path) -> dict[int, Path]:
    """Return the previous checkpoints by number, newest first."""
    matches = {path: OLDER.fullmatch(path.name) for path in folder.glob("checkpoint-*.pt")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def newest_first(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints of a run, intact or damaged, newest first."""
    newest = folder / NAME
    return [newest] * newest.exists() + list(_older(folder).values())


def _rotate(folder: Path, keep: int) -> None:
    """Increment the numbers of the last ``keep`` - 1 checkpoints, and delete older ones."""
    for number in range(keep - 1, 0, -1):
        newer = folder / (f"checkpoint-{number - 1}.pt" if number > 1 else NAME)
        if newer.exists():
            os.replace(newer, folder / f"checkpoint-{number}.pt")
    for number, path in _older(folder).items():
        if number >= keep:
            path.unlink()
