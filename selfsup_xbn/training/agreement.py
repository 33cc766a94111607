"""Agreement of the processes of a run on what they train.

Process 0 alone reads the run folder and sends its configuration and its checkpoint to the others. Configurations, data
and checkpoints that differ end all processes with one line, which names the process and the field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from selfsup_xbn.config.saved import from_resolved
from selfsup_xbn.config.schema import Config, resolved
from selfsup_xbn.data import ImageData
from selfsup_xbn.errors import UserError
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.utils.distributed import bytes_from_first, first_text, rank, world
from selfsup_xbn.utils.files import read_bytes

T = TypeVar("T")
OWN = ("out", "data_root", "workers")
"""Options that may differ between the processes."""


def agreed_config(config: Config, explicit: Mapping[str, Any] | None) -> Config:
    """Check that all processes have the configuration of process 0, and return it.

    Args:
        config: Configuration of this process.
        explicit: Options that this process was given, if all others are to be those of process 0, which reads the
            configuration of a resumed run.

    Raises:
        UserError: A process has another value of an option.
    """
    if world() == 1:
        return config
    first = json.loads(bytes_from_first(json.dumps(resolved(config)).encode()))
    if explicit is not None and first["mode"] == config.mode:
        base = from_resolved(first)
        config = replace(base, **{**{name: getattr(config, name) for name in OWN}, **explicit})
    own = resolved(config)
    compared = ["mode", *(item.name for item in fields(config) if item.name not in OWN)]
    _require_equal({_flag(name): own[name] for name in compared}, {_flag(name): first.get(name) for name in compared})
    return config


def check_same_data(data: ImageData) -> None:
    """Check that all processes have the same number of images, the same labels and the same digest of the images.

    Raises:
        UserError: A process has other data.
    """
    splits = {"train": data.train, "test": data.test, "gallery": data.gallery, "validation": data.validation}
    digests = {
        f"data: {name}": f"{len(split)} images, labels {hashlib.sha256(split.labels.numpy().tobytes()).hexdigest()[:8]}"
        for name, split in splits.items()
        if split is not None
    } | {"data: sha256": data.digest}
    _require_equal(digests, json.loads(bytes_from_first(json.dumps(digests).encode())))


def agreed_checkpoint(folder: Path, resume: bool) -> dict[str, Any] | None:
    """Return the state of the last checkpoint of process 0, or ``None`` for a new run.

    Args:
        folder: Run folder of this process. Only that of process 0 has to exist.
        resume: Whether process 0 continues a run.

    Raises:
        UserError: There is no intact checkpoint, or the run folder of another process has other checkpoints.
    """
    path = on_first(lambda: checkpoint.newest(folder) if resume and checkpoint.exists(folder) else None)
    if world() == 1:
        return None if path is None else checkpoint.read(path)
    content = bytes_from_first(b"" if path is None else read_bytes(path))
    state = checkpoint.read(content) if content else None
    expected = "none" if state is None else _described(content[-checkpoint.SEAL_BYTES :].hex(), state)
    own = checkpoint.newest_first(folder) if resume else []
    if not own or any(checkpoint.seal(other) == content[-checkpoint.SEAL_BYTES :].hex() for other in own):
        value = expected
    else:
        value = _described(checkpoint.seal(own[0]), checkpoint.read(own[0]))
    _require_equal({"checkpoint": value}, {"checkpoint": expected})
    return state


def on_first(function: Callable[[], T]) -> T | None:
    """Call a function on process 0 and return its result there, and ``None`` on the others.

    Args:
        function: Function without arguments.

    Raises:
        UserError: The function raised it or an ``OSError``. All processes raise the same error.
    """
    result, error = None, ""
    if rank() == 0:
        try:
            result = function()
        except (UserError, OSError) as refusal:
            if world() == 1:
                raise
            error = str(refusal)
    if error := first_text(error):
        raise UserError(error)
    return result


def _described(seal: str, state: dict[str, Any]) -> str:
    return f"{seal[:8]}, epoch {state.get('epoch')}, step {state.get('step')}"


def _require_equal(own: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Check that the values of all processes equal those of process 0.

    Raises:
        UserError: A value differs. All processes raise the same error.
    """
    different = [name for name in [*first, *own] if own.get(name) != first.get(name)]
    error = ""
    if different:
        name = different[0]
        error = f"process {rank()}: {name}: expected {first.get(name)!r} as in process 0, got {own.get(name)!r}"
    if error := first_text(error):
        raise UserError(error)


def _flag(name: str) -> str:
    return name if name == "mode" else "--" + name.replace("_", "-")
