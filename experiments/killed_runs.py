"""Runs as processes of their own, which can be killed at a chosen moment, and what tells two finished runs apart.

For ``faults.py``. Every process is forked from this one, so that torch is imported once.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from selfsup_xbn.cli import main as command
from selfsup_xbn.commands import train as commands_train
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.training import trainer as train

PLACES: dict[str, tuple[Any, str]] = {
    "step": (train.Run, "train_step"),
    "epoch's end": (train.Run, "end_epoch"),
    "checkpoint": (checkpoint, "save"),
}
TINY = ["--backbone", "convnet-digits", "--epochs", "3", "--drift-every", "2", "--knn-k", "5", "--dim", "16"]
MODES = {
    "pretrain": ["pretrain", *TINY, "--batch-size", "16", "--queue-size", "40"],
    "supervise": ["supervise", *TINY, "--batch-size", "16", "--images-per-class", "4", "--recall-ks", "1"],
}
SOURCES = {"pretrain": "digits", "supervise": "digits-disjoint"}


def cells(photos: Path) -> dict[str, list[str]]:
    """The runs: both modes with every memory, on images in memory, on files, and on files read by two workers."""
    found = {}
    for mode, options in MODES.items():
        for memory in ("none", "xbm", "xbn", "axbn")[mode == "pretrain" :]:
            own = ["--queue-size", "0"] if memory == "none" else ["--adaptation", memory]
            found[f"{mode} {memory}"] = [*options, *own, "--data", SOURCES[mode], "--limit-train", "96"]
            for workers in ("0", "2"):
                files = ["--data", f"folder:{photos}", "--image-size", "16", "--workers", workers]
                found[f"{mode} {memory}, {workers} workers"] = [*options, *own, *files]
    return found


def write_photos(folder: Path) -> Path:
    """An image folder of four classes in two sizes, so that its files are read while training."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 12), ("test", 4)):
        for label in "abcd":
            (folder / part / label).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (18 + index % 2, 20, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{index:02}.png")
    return folder


# ------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, what it printed, and the seconds of each call of each place."""

    code: int | None
    printed: str = ""
    seconds: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class Kill:
    """SIGKILL ``delay`` seconds after the ``number``-th call at a place began."""

    place: str
    number: int
    delay: float


def run(argv: list[str], folder: Path, kill: Kill | None = None, file_bytes: int | None = None) -> Ended:
    """The command in a process of its own, which goes on with the run in the folder if there is one.

    Args:
        argv: the command's arguments, but for the folder.
        folder: of the run.
        kill: when to kill it.
        file_bytes: the largest file that it may write (RLIMIT_FSIZE).
    """
    context = get_context("fork")
    ours, theirs = context.Pipe()
    argv = [*argv, "--resume", "--out", str(folder)]
    process = context.Process(target=_child, args=(argv, theirs, kill, file_bytes))
    process.start()
    theirs.close()
    try:
        while True:
            message = ours.recv()
            if isinstance(message, Ended):
                process.join()
                return message
            time.sleep(kill.delay if kill else 0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
    except EOFError:
        process.join()
        return Ended(process.exitcode)


def _child(argv: list[str], parent: Connection, kill: Kill | None, file_bytes: int | None) -> None:
    os.setsid()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {place: [] for place in PLACES}
    for place, (owner, name) in PLACES.items():
        number = kill.number if kill and kill.place == place else 0
        setattr(owner, name, _watched(getattr(owner, name), seconds[place], number, parent))
    for name in ("draw_curves", "draw_gallery"):
        setattr(commands_train, name, lambda *_: None)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = command(argv)
    parent.send(Ended(code, output.getvalue(), seconds))


def _watched(function: Callable[..., Any], seconds: list[float], number: int, parent: Connection) -> Callable[..., Any]:
    """The same function, which keeps the time, and tells the parent when its ``number``-th call begins."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(seconds) + 1 == number:
            parent.send("here")
        started = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    return call


# ------------------------------------------------------------------------------------------------------ comparison


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two finished runs."""
    names = [checkpoint.NAME, *([checkpoint.BEST] if (one / checkpoint.BEST).exists() else [])]
    found = [f"{name}: {path}" for name in names for path in _different(_state(one, name), _state(other, name))]
    return found + ["metrics"] * (_timeless(one) != _timeless(other))


def _state(folder: Path, name: str) -> dict[str, Any]:
    """All of a checkpoint that does not depend on the clock or on where and how the run's files are kept."""
    state = checkpoint.load(folder, name)
    state["meter"].pop("seconds")
    return {key: value for key, value in state.items() if key not in ("config", "log_bytes")}


def _timeless(folder: Path) -> list[dict[str, Any]]:
    return [record | {"images_per_second": 0} for record in read_metrics(folder)]


def _different(one: Any, other: Any, name: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [path for key in one for path in _different(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            path for i, pair in enumerate(zip(one, other, strict=True)) for path in _different(*pair, f"{name}.{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    return [] if type(one) is type(other) and one == other else [name]
