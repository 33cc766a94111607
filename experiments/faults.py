"""Nothing lost: runs that are killed, whose checkpoints are damaged, or whose disk is full, go on with ``--resume`` and
end bit for bit as the run that nothing happened to.

python -m experiments.faults                # 50 kills, 10 damaged checkpoints, 12 full disks: minutes on one core

Every run is a process forked from this one, through the command line. A kill is a SIGKILL to the run and its
DataLoader workers, drawn from ``--seed``: at the n-th step, the n-th end of an epoch or the n-th writing of a
checkpoint, after a share of the time that it takes. Weights, queue, optimiser, random state and every logged number but
the images a second are compared. Pictures are not drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import runs
from experiments.killed_runs import PLACES, Ended, Kill, cells, differences, run, write_photos
from selfsup_xbn.data import DATA_SETS
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import environment


class Campaign:
    """Cases, their random numbers, and the uninterrupted run of each cell, made when it is first asked for."""

    def __init__(self, folder: Path, seed: int) -> None:
        for module in ("lightly.transforms", "timm.data"):
            importlib.import_module(module)  # once, and not in every run
        list(DATA_SETS.values())  # imports each
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

    def grow() -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)

    try:
        yield grow
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
    runs.write(runs.RESULTS / "faults.json", [result | {"seconds": round(time.perf_counter() - started)}])
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
