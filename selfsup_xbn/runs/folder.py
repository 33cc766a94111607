"""Run folder: ``config.json``, ``metrics.jsonl`` (one JSON object per line), ``checkpoint.pt`` and plots."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from selfsup_xbn.config.registry import EXPORTS
from selfsup_xbn.config.saved import differences, from_resolved
from selfsup_xbn.config.schema import Config, resolved
from selfsup_xbn.errors import UserError, require_package
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.environment import environment
from selfsup_xbn.runs.tensorboard import EVENTS, ScalarLog
from selfsup_xbn.utils import atomic
from selfsup_xbn.utils.files import read_bytes
from selfsup_xbn.utils.launch import launch_id, restarts

CONFIG, METRICS = "config.json", "metrics.jsonl"
DATA = "data sha256"
"""Key of the digest of the images in the environment of ``config.json``."""
LARGEST = 1e300  # bound of valid values; larger integers in JSON do not fit a float
RUN_FILES = (
    CONFIG,
    METRICS,
    checkpoint.NAME,
    checkpoint.BEST,
    "curves.png",
    "retrieval.png",
    *EXPORTS.values(),
)


def read_config(folder: Path) -> Config:
    """Return the configuration of a run.

    Raises:
        UserError: The folder has no run, or its ``config.json`` is damaged.
    """
    path = folder / CONFIG
    try:
        return from_resolved(json.loads(read_bytes(path)))
    except (FileNotFoundError, NotADirectoryError):
        if checkpoint.has_intact(folder):
            raise UserError(_config_missing(folder)) from None
        runs = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; there are runs in {folder}/*, such as {runs[0]}" if runs else ""
        raise UserError(f"no run in {folder}: expected a file {CONFIG} there{hint}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"cannot read {path} ({error}): restore it, or start a new run with --overwrite") from None


def _config_missing(folder: Path) -> str:
    return (
        f"{folder} has a checkpoint, but its {CONFIG} is missing: restore the file, or start a new run with --overwrite"
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of ``metrics.jsonl``, oldest first.

    Raises:
        UserError: The file does not exist, a line is damaged, or a line was changed after the newest checkpoint was
            written.
    """
    path = folder / METRICS
    try:
        content = read_bytes(path)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    records = [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    _check_log(path, content, *checkpoint.covered_log(folder))
    return records


def _check_log(path: Path, content: bytes, size: int, sha256: str) -> None:
    """Check that a log begins with the bytes that a checkpoint covers.

    Args:
        path: The log.
        content: Its content.
        size: Number of bytes that the checkpoint covers.
        sha256: Their checksum, or ``""`` for a checkpoint without one.

    Raises:
        UserError: The log is shorter or differs.
    """
    if len(content) < size or (sha256 and hashlib.sha256(content[:size]).hexdigest() != sha256):
        got = f"got {len(content)}" if len(content) < size else "but they differ (the checksum does not match)"
        raise UserError(
            f"{path}: expected at least the {size} bytes that the checkpoint refers to, {got}: "
            "restore it, or start a new run with --overwrite"
        )


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or type(record.get("epoch")) is not int:
        raise UserError(f"{where}: expected a JSON object with an epoch, got {line[:60]!r}")
    for key, value in record.items():
        if value is not None and not (type(value) in (int, float) and abs(value) < LARGEST):
            raise UserError(f"{where}: expected a number or null for {key[:60]!r}, got {str(value)[:60]!r}")
    return record


def run_files(folder: Path) -> list[Path]:
    """Return the files of a run in the folder, including temporary files of killed runs."""
    names = {
        path: path.name.removesuffix(atomic.TEMPORARY).removesuffix(checkpoint.DAMAGED) for path in folder.glob("*")
    }
    paths = {path for path, name in names.items() if name in RUN_FILES or checkpoint.OLDER.fullmatch(name)}
    return sorted(paths | set(folder.glob(EVENTS)))


def read_environment(folder: Path) -> dict[str, str]:
    """Return the versions, machine and commit that the valid ``config.json`` of a run records."""
    values = json.loads(read_bytes(folder / CONFIG)).get("environment")
    return {name: str(value) for name, value in values.items()} if isinstance(values, dict) else {}


def began_in_this_launch(folder: Path) -> bool:
    """Return whether the run in the folder was started or resumed by this launch of torchrun, before a restart."""
    if not restarts() or not has_run(folder):
        return False
    try:
        values = json.loads(read_bytes(folder / CONFIG))
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(values, dict) and values.get("launch") == launch_id() != ""


def has_run(folder: Path) -> bool:
    """Return whether the folder has a run."""
    return (folder / CONFIG).exists()


def check_folder(folder: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may write to a folder. Nothing is written.

    Args:
        folder: Run folder.
        config: Configuration of the run.
        resume: Whether to continue an existing run.
        overwrite: Whether to replace an existing run.

    Raises:
        UserError: The folder has a run and neither ``resume`` nor ``overwrite`` is set, the run has another
            configuration, the path is not a directory, or it cannot be created.
    """
    if config.tensorboard:
        require_package("tensorboard", "--tensorboard", "tensorboard")
    atomic.check_creatable(folder)
    if overwrite:
        return
    if not has_run(folder):
        if checkpoint.has_intact(folder):
            raise UserError(_config_missing(folder))
        if names := [path.name for path in run_files(folder) if path.suffix != atomic.TEMPORARY]:
            raise UserError(f"{folder} has a file {names[0]} that belongs to no run: choose another --out")
        return
    if not resume:
        raise UserError(
            f"{folder} already has a run: continue with --resume, replace it with --overwrite, or choose another --out"
        )
    saved = read_config(folder)
    if saved.mode != config.mode:
        raise UserError(
            f"{folder}: expected a run of mode {config.mode}, got a run of mode {saved.mode}: choose another --out"
        )
    if changes := differences(saved, config):
        raise UserError(
            f"{folder} has a run with another configuration ({changes[0]}): remove the option, or choose another --out"
        )


def check_data(folder: Path, digest: str) -> None:
    """Check that the images are those that the run in a folder was trained on.

    Args:
        folder: Folder of the run to continue.
        digest: SHA-256 of the images, or "" if the data set has none.

    Raises:
        UserError: The images differ.
    """
    saved = read_environment(folder).get(DATA, digest)
    if saved != digest:
        raise UserError(
            f"{folder}: expected the images with SHA-256 {saved[:12]}..., got {digest[:12]}...: install the versions "
            f"of matplotlib and pillow that the run began with, or choose another --out"
        )


class RunFolder:
    """The files of a run, open for writing.

    Args:
        folder: Run folder, which is created if needed.
        config: Configuration, which is written to ``config.json`` with versions, machine and commit.
        keep_bytes: Number of bytes of ``metrics.jsonl`` to keep when a run is resumed. With 0 the files of an earlier
            run are deleted.
        keep_sha256: Checksum of these bytes. They are not verified if it is ``""``.
        data: SHA-256 of the images, or "" if the data set has none. It is written to ``config.json``.

    Raises:
        UserError: ``metrics.jsonl`` is shorter than ``keep_bytes`` or differs, or a file could not be written.
    """

    def __init__(
        self, folder: Path, config: Config, keep_bytes: int = 0, keep_sha256: str = "", *, data: str = ""
    ) -> None:
        self.folder = folder
        kept = b""
        if keep_bytes:
            with contextlib.suppress(OSError):
                kept = read_bytes(folder / METRICS)
            _check_log(folder / METRICS, kept, keep_bytes, keep_sha256)
        self._sha256 = hashlib.sha256(kept[:keep_bytes])
        folder.mkdir(parents=True, exist_ok=True)
        for path in run_files(folder):
            if not keep_bytes or path.suffix == atomic.TEMPORARY:
                path.unlink()
        checkpoint.rename_damaged(folder)
        versions = environment() | ({DATA: data} if data else {})
        launch = {"launch": launch_id()} if launch_id() else {}
        text = json.dumps(resolved(config) | {"environment": versions} | launch, indent=2)
        with atomic.replacing(folder / CONFIG) as file:
            file.write(text.encode() + b"\n")
        with atomic.writing(folder / METRICS):
            self._metrics = atomic.open_to_append(folder / METRICS)
            self._metrics.truncate(keep_bytes)
        self._scalars = ScalarLog(folder, read_metrics(folder)) if config.tensorboard else None

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to ``metrics.jsonl``.

        Numbers are rounded to six significant digits, and numbers that are not finite are written as null.

        Raises:
            UserError: The file could not be written.
        """
        rounded = {key: _rounded(value) for key, value in record.items()}
        with atomic.writing(self.folder / METRICS):
            line = json.dumps(rounded).encode() + b"\n"
            self._metrics.write(line)
            self._metrics.flush()
            self._sha256.update(line)
            if self._scalars:
                self._scalars.log(rounded)

    def log_state(self) -> dict[str, Any]:
        """Return the size of ``metrics.jsonl`` in bytes and its checksum, after a flush to the disk.

        Raises:
            UserError: The file could not be written.
        """
        with atomic.writing(self.folder / METRICS):
            os.fsync(self._metrics.fileno())
        return {"log_bytes": os.fstat(self._metrics.fileno()).st_size, "log_sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        """Close the files."""
        with contextlib.suppress(OSError):  # ``log`` has already reported write errors
            self._metrics.close()
            if self._scalars:
                self._scalars.close()


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
