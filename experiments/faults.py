"""Nothing lost: runs that are killed, whose checkpoints are damaged, or whose disk is full, go on with ``--resume`` and
end bit for bit as the run that nothing happened to.

python -m experiments.faults                # 50 kills, 10 damaged checkpoints, 10 full disks: minutes on one core

Every run is a process forked from this one, through the command line. A kill is a SIGKILL to the run and its
DataLoader workers, drawn from ``--seed``: at the n-th step, the n-th end of an epoch or the n-th writing of a
checkpoint, after a share of the time that it takes. Weights, queue, optimiser, random state and every logged number but
the images a second are compared. Pictures are not drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from experiments import runs
from selfsup_xbn import checkpoint, train
from selfsup_xbn.cli import main as command
from selfsup_xbn.data import DATA_SETS
from selfsup_xbn.run_log import environment, read_metrics

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
        setattr(train, name, lambda *_: None)
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


# -------------------------------------------------------------------------------------------------------- campaign


class Campaign:
    """Cases, their random numbers, and the uninterrupted run of each cell, made when it is first asked for."""

    def __init__(self, folder: Path, seed: int) -> None:
        for module in ("lightly.transforms", "timm.data", *(f"selfsup_xbn.data.{name}" for name in DATA_SETS.values())):
            importlib.import_module(module)  # once, and not in every run
        self.folder, self.random = folder, random.Random(seed)
        self.cells = cells(write_photos(folder / "photos"))
        self.cases: list[dict[str, Any]] = []
        self._whole: dict[str, Ended] = {}

    def whole(self, cell: str) -> tuple[Path, dict[str, list[float]]]:
        """Folder of the uninterrupted run, and the seconds of each call."""
        folder = self.folder / cell
        if cell not in self._whole:
            self._whole[cell] = run(self.cells[cell], folder)
            assert self._whole[cell].code == 0, self._whole[cell].printed
        return folder, self._whole[cell].seconds or {}

    def kill(self, cell: str, place: str) -> None:
        """A run that is killed at a random moment of that kind, and goes on."""
        folder, seconds = self._folder(), self.whole(cell)[1][place]
        number, share = self.random.randint(1, len(seconds)), self.random.random()
        delay = share * statistics.median(seconds)
        while run(self.cells[cell], folder, Kill(place, number, delay)).code == 0:  # it was over before
            shutil.rmtree(folder)
            delay /= 2
        half = any(folder.glob("*.tmp"))
        self._finish(f"killed: {place}", cell, folder, number=number, share=round(share, 3), half_written=half)

    def damage(self, cell: str, how: str) -> None:
        """A run that is killed in its last epoch, whose newest checkpoint is then damaged, and that goes on."""
        folder = self._killed_in_the_last_epoch(cell)
        newest = folder / checkpoint.NAME
        damaged, where = damage(newest.read_bytes(), how, self.random)
        newest.write_bytes(damaged)
        self._finish(f"damaged: {how}", cell, folder, said=f"{newest} is damaged", where=where)

    def fill(self, cell: str, share: float) -> None:
        """A run that may write files of no more than a share of a checkpoint's size, and then of any size."""
        folder = self._killed_in_the_last_epoch(cell)
        limit = round(share * (folder / checkpoint.NAME).stat().st_size)
        fault = self._refused(folder, run(self.cells[cell], folder, file_bytes=limit))
        self._finish("full disk: RLIMIT_FSIZE", cell, folder, fault=fault, limit=limit)

    def fill_tmpfs(self, cell: str, share: float) -> None:
        """A run on a file system that has room for two checkpoints and a share of the third, and then for more."""
        folder = self._folder()
        size = (self.whole(cell)[0] / checkpoint.NAME).stat().st_size
        with tmpfs(folder, round((2 + share) * size) + 2**15) as grow:
            ended = run(self.cells[cell], folder / "run")
            fault = self._refused(folder / "run", ended)
            grow()
            self._finish("full disk: tmpfs", cell, folder / "run", fault=fault, share=round(share, 3))

    def _folder(self) -> Path:
        return self.folder / f"case {len(self.cases)}"

    def _killed_in_the_last_epoch(self, cell: str) -> Path:
        steps = len(self.whole(cell)[1]["step"])
        run(self.cells[cell], self._folder(), Kill("step", steps - 1, 0.0))
        assert len(list(self._folder().glob("checkpoint*.pt"))) == 2
        return self._folder()

    @staticmethod
    def _refused(folder: Path, ended: Ended) -> str:
        """What is wrong with how a run met a full disk; "" where nothing is."""
        lines = [line for line in ended.printed.splitlines() if line.startswith("error: cannot write ")]
        if ended.code != 2 or len(lines) != 1 or "Traceback" in ended.printed:
            return f"exit code {ended.code}: {ended.printed}"
        return f"left {list(folder.glob('*.tmp'))}" if any(folder.glob("*.tmp")) else ""

    def _finish(self, kind: str, cell: str, folder: Path, said: str = "", fault: str = "", **details: Any) -> None:
        """Lets the run go on to its end and compares it."""
        ended = run(self.cells[cell], folder)
        found = [fault] if fault else []
        if ended.code != 0 or said not in ended.printed:
            found.append(f"exit code {ended.code}: {ended.printed}")
        else:
            found += differences(self.whole(cell)[0], folder)
        self.cases.append({"kind": kind, "cell": cell, "equal": not found, "found": found, **details})
        if folder.exists() and not found:
            shutil.rmtree(folder)


def damage(content: bytes, how: str, rng: random.Random) -> tuple[bytes, int]:
    """A file's content "truncated", with one bit "flipped", or "empty"; and where."""
    if how == "empty":
        return b"", 0
    place = rng.randrange(len(content))
    if how == "truncated":
        return content[:place], place
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :], place


@contextlib.contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """A file system of so many bytes in the folder, and a function that makes it large.

    Raises:
        PermissionError: it may not be mounted here.
    """
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        folder.rmdir()
        raise PermissionError("a tmpfs may not be mounted here")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True) and None
    finally:
        subprocess.run(["umount", folder], check=True)


def campaign(
    folder: Path, seed: int, kills: int, damaged: int, full: int, names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """So many cases of each kind, spread over the cells of these names, or over all; each with whether its run ended
    equal, and what differed."""
    made = Campaign(folder, seed)
    names = names or made.random.sample(list(made.cells), len(made.cells))
    in_memory = [name for name in names if "workers" not in name]
    for number in range(kills):
        made.kill(names[number % len(names)], list(PLACES)[(number + number // len(names)) % 3])
    for number in range(damaged):
        made.damage(names[number % len(names)], ("flipped", "truncated", "empty")[number % 3])
    for number in range(full):
        made.fill(in_memory[number % len(in_memory)], made.random.random())
    with contextlib.suppress(PermissionError, FileNotFoundError):
        for number in range(full // 2):
            made.fill_tmpfs(in_memory[number % len(in_memory)], made.random.random())
    return made.cases


def counts(cases: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Cases tried, and ended equal, by kind."""
    tried = Counter(case["kind"] for case in cases)
    equal = Counter(case["kind"] for case in cases if case["equal"])
    return {kind: {"tried": tried[kind], "equal": equal[kind]} for kind in tried}


def main() -> None:
    """Runs the campaign, writes its results, prints the counts."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seed", 0), ("kills", 50), ("damaged", 10), ("full", 8)):
        made.add_argument(f"--{name}", type=int, default=default)
    options = made.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cases = campaign(Path(folder), options.seed, options.kills, options.damaged, options.full)
    found = counts(cases)
    result = {"label": "faults", **vars(options), "counts": found, "cases": cases, "environment": environment()}
    runs.write("faults", [result | {"seconds": round(time.perf_counter() - started)}])
    for kind, number in found.items():
        print(f"{kind:<26} tried {number['tried']:>3}, equal {number['equal']:>3}")
    half = sum(case.get("half_written", False) for case in cases)
    print(f"{'all':<26} tried {len(cases):>3}, equal {sum(case['equal'] for case in cases):>3}")
    print(f"{half} of the kills left a half-written file")
    for case in cases:
        if not case["equal"]:
            print(json.dumps(case))


if __name__ == "__main__":
    main()
