"""Training runs in processes that can be killed at a chosen moment.

Every process is forked from the caller's, so that torch is imported once.
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
from matplotlib.figure import Figure
from PIL import Image

from selfsup_xbn.cli import main as command
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.training.run import Run
from tests.command_line import PRETRAIN, SUPERVISE

PLACES: dict[str, tuple[Any, str]] = {
    "step": (Run, "train_step"),
    "epoch's end": (Run, "end_epoch"),
    "checkpoint": (checkpoint, "save"),
}
TINY = ["--backbone", "convnet-digits", "--epochs", "3", "--drift-every", "2", "--knn-k", "5", "--dim", "16"]
TINY += ["--limit-test", "64"]
MODES = {
    "pretrain": [*PRETRAIN, *TINY, "--batch-size", "16", "--queue-size", "40"],
    "supervise": [*SUPERVISE, *TINY, "--batch-size", "16", "--images-per-class", "4", "--recall-ks", "1"],
}
SOURCES = {"pretrain": "digits", "supervise": "digits-disjoint"}


def run_arguments(photos: Path) -> dict[str, list[str]]:
    """Return the arguments of each run of a campaign, by name.

    Both modes with every memory, each on images in memory, on files, and on files read by two workers.
    """
    arguments = {}
    for mode, options in MODES.items():
        for memory in ("none", "xbm", "xbn", "axbn")[mode == "pretrain" :]:
            own = ["--queue-size", "0"] if memory == "none" else ["--adaptation", memory]
            arguments[f"{mode} {memory}"] = [*options, *own, "--data", SOURCES[mode], "--limit-train", "96"]
            for workers in ("0", "2"):
                files = ["--data", f"folder:{photos}", "--image-size", "16", "--workers", workers]
                arguments[f"{mode} {memory}, {workers} workers"] = [*options, *own, *files]
    return arguments


def write_photos(folder: Path) -> Path:
    """Write an image folder of four classes in two sizes, which are read from disk during training."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 4)):
        for label in "abcd":
            (folder / split / label).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (18 + index % 2, 20, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index:02}.png")
    return folder


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, its output, and the seconds of each call at each place."""

    code: int | None
    printed: str = ""
    seconds: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class Kill:
    """SIGKILL ``delay`` seconds after the start of the ``number``-th call at a place, counted from 1."""

    place: str
    number: int
    delay: float


def run(argv: list[str], folder: Path, kill: Kill | None = None, file_bytes: int | None = None) -> Ended:
    """Run the command in a new process, which resumes the run of the folder if there is one.

    Args:
        argv: Arguments of the command without the folder.
        folder: Folder of the run.
        kill: When to kill the process and its DataLoader workers; ``None``: never.
        file_bytes: Largest file that the process may write (RLIMIT_FSIZE); ``None``: no limit.

    Returns:
        How the process ended.
    """
    context = get_context("fork")
    parent_end, child_end = context.Pipe()
    argv = [*argv, "--resume", "--out", str(folder)]
    process = context.Process(target=_child, args=(argv, child_end, kill, file_bytes))
    process.start()
    child_end.close()
    try:
        while True:
            message = parent_end.recv()
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
    setattr(Figure, "savefig", lambda *_, **__: None)  # noqa: B010  pictures are no part of a run's state
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = command(argv)
    parent.send(Ended(code, output.getvalue(), seconds))


def _watched(function: Callable[..., Any], seconds: list[float], number: int, parent: Connection) -> Callable[..., Any]:
    """Return the function with a clock; it messages the parent when its ``number``-th call starts."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(seconds) + 1 == number:
            parent.send("started")
        started = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    return call
