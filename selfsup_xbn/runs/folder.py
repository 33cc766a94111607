"""The folder of a run: ``config.json``, ``metrics.jsonl`` (one object a line), ``checkpoint.pt``, pictures."""

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

CONFIG, METRICS = "config.json", "metrics.jsonl"
LARGEST = 1e300  # no measurement is larger; whole numbers in JSON can be, and then are no floats
OWN_FILES = (
    CONFIG,
    METRICS,
    checkpoint.NAME,
    checkpoint.BEST,
    "curves.png",
    "retrieval.png",
    *EXPORTS.values(),
)


def read_config(folder: Path) -> Config:
    """The config of a run.

    Raises:
        UserError: the folder holds no run, or its ``config.json`` is damaged.
    """
    path = folder / CONFIG
    try:
        return from_resolved(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run in {folder}: found no {CONFIG} there") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"cannot read {path} ({error}): restore it, or start over with --overwrite") from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of ``metrics.jsonl``, oldest first.

    Raises:
        UserError: there is no such file, or a line is damaged.
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
            raise UserError(f"{where}: expected a number or null as {key[:60]!r}, got {str(value)[:60]!r}")
    return record


def own_files(folder: Path) -> list[Path]:
    """The files in the folder that a run writes, with what killed ones left over."""
    names = {path: path.name.removesuffix(atomic.TEMPORARY).removesuffix(checkpoint.ASIDE) for path in folder.glob("*")}
    own = {path for path, name in names.items() if name in OWN_FILES or checkpoint.OLDER.fullmatch(name)}
    return sorted(own | set(folder.glob(EVENTS)))


def read_environment(folder: Path) -> dict[str, str]:
    """Versions, machine and commit of a run whose config can be read."""
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("environment")
    return {name: str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def holds_run(folder: Path) -> bool:
    """Whether a run was started in the folder."""
    return (folder / CONFIG).exists()


def check_folder(folder: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Refuses a folder that the run may not use, before anything is written.

    Raises:
        UserError: a run is there and neither ``resume`` nor ``overwrite`` was asked for, it was made with another
            configuration, or the path is no folder.
    """
    if config.tensorboard:
        require_package("tensorboard", "--tensorboard", "tensorboard")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give another --out")
    if overwrite:
        return
    if not holds_run(folder):
        if found := [path.name for path in own_files(folder) if path.suffix != atomic.TEMPORARY]:
            raise UserError(f"{folder} holds no run, but a file {found[0]} of something else: give another --out")
        return
    if not resume:
        raise UserError(
            f"{folder} already holds a run: go on with --resume, replace it with --overwrite, or give --out"
        )
    saved = read_config(folder)
    if saved.mode != config.mode:
        raise UserError(f"{folder} holds a run of mode {saved.mode}, not {config.mode}: give another --out")
    if found := differences(saved, config):
        raise UserError(
            f"{folder} holds a run with other settings ({found[0]}): drop the option, or give another --out"
        )


class RunFolder:
    """A run's files, open for writing.

    Args:
        folder: made if it is not there.
        config: written to ``config.json`` with versions, machine and git commit.
        keep_bytes: what of ``metrics.jsonl`` is kept when the run goes on; 0 for a new run, for which an earlier run's
            files are removed.
    """

    def __init__(self, folder: Path, config: Config, keep_bytes: int = 0) -> None:
        self.folder = folder
        if keep_bytes and (not (folder / METRICS).is_file() or (folder / METRICS).stat().st_size < keep_bytes):
            raise UserError(
                f"{folder / METRICS} is shorter than at the checkpoint: restore it, or start with --overwrite"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for path in own_files(folder):
            if not keep_bytes or path.suffix == atomic.TEMPORARY:
                path.unlink()
        checkpoint.set_damaged_aside(folder)
        text = json.dumps(resolved(config) | {"environment": environment()}, indent=2)
        with atomic.replacing(folder / CONFIG) as file:
            file.write(text.encode() + b"\n")
        self._metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115  (open for the whole run)
        self._metrics.truncate(keep_bytes)
        self._scalars = ScalarLog(folder, read_metrics(folder)) if config.tensorboard else None

    def log(self, record: dict[str, Any]) -> None:
        """Adds one line to ``metrics.jsonl``; numbers keep six digits, and what is not finite becomes null.

        Raises:
            UserError: it cannot be written.
        """
        rounded = {key: _rounded(value) for key, value in record.items()}
        with atomic.writing(self.folder / METRICS):
            self._metrics.write(json.dumps(rounded) + "\n")
            self._metrics.flush()
            if self._scalars:
                self._scalars.log(rounded)

    @property
    def position(self) -> int:
        """Return the bytes of ``metrics.jsonl`` so far, flushed to the disk: a checkpoint holds their number."""
        with atomic.writing(self.folder / METRICS):
            os.fsync(self._metrics.fileno())
        return os.fstat(self._metrics.fileno()).st_size

    def close(self) -> None:
        """Closes the files."""
        with contextlib.suppress(OSError):  # what could not be written was said by ``log``
            self._metrics.close()
            if self._scalars:
                self._scalars.close()


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
