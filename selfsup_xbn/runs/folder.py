"""Run folder: ``config.json``, ``metrics.jsonl`` (one JSON object per line), ``checkpoint.pt`` and plots."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from selfsup_xbn.config.schema import EXPORTS, Config, differences, from_resolved, resolved
from selfsup_xbn.errors import UserError, require_package
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.environment import environment
from selfsup_xbn.runs.tensorboard import EVENTS, ScalarLog
from selfsup_xbn.utils import atomic
from selfsup_xbn.utils.launch import launch_id, restarts

CONFIG, METRICS = "config.json", "metrics.jsonl"
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
        return from_resolved(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run in {folder}: expected a file {CONFIG} there") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"cannot read {path} ({error}): restore it, or start a new run with --overwrite") from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of ``metrics.jsonl``, oldest first.

    Raises:
        UserError: The file does not exist, or a line is damaged.
    """
    path = folder / METRICS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


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
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("environment")
    return {name: str(value) for name, value in values.items()} if isinstance(values, dict) else {}


def began_in_this_launch(folder: Path) -> bool:
    """Return whether the run in the folder was started or resumed by this launch of torchrun, before a restart."""
    if not restarts() or not has_run(folder):
        return False
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
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
            configuration, or the path is not a directory.
    """
    if config.tensorboard:
        require_package("tensorboard", "--tensorboard", "tensorboard")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out")
    if overwrite:
        return
    if not has_run(folder):
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


class RunFolder:
    """The files of a run, open for writing.

    Args:
        folder: Run folder, which is created if needed.
        config: Configuration, which is written to ``config.json`` with versions, machine and commit.
        keep_bytes: Number of bytes of ``metrics.jsonl`` to keep when a run is resumed. With 0 the files of an earlier
            run are deleted.

    Raises:
        UserError: ``metrics.jsonl`` is shorter than ``keep_bytes``, or a file could not be written.
    """

    def __init__(self, folder: Path, config: Config, keep_bytes: int = 0) -> None:
        self.folder = folder
        if keep_bytes and (not (folder / METRICS).is_file() or (folder / METRICS).stat().st_size < keep_bytes):
            raise UserError(
                f"{folder / METRICS}: expected at least the {keep_bytes} bytes that the checkpoint refers to: "
                "restore it, or start a new run with --overwrite"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for path in run_files(folder):
            if not keep_bytes or path.suffix == atomic.TEMPORARY:
                path.unlink()
        checkpoint.rename_damaged(folder)
        launch = {"launch": launch_id()} if launch_id() else {}
        text = json.dumps(resolved(config) | {"environment": environment()} | launch, indent=2)
        with atomic.replacing(folder / CONFIG) as file:
            file.write(text.encode() + b"\n")
        self._metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115  (open for the whole run)
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
            self._metrics.write(json.dumps(rounded) + "\n")
            self._metrics.flush()
            if self._scalars:
                self._scalars.log(rounded)

    @property
    def position(self) -> int:
        """Current size of ``metrics.jsonl`` in bytes, after a flush to the disk.

        Raises:
            UserError: The file could not be written.
        """
        with atomic.writing(self.folder / METRICS):
            os.fsync(self._metrics.fileno())
        return os.fstat(self._metrics.fileno()).st_size

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
