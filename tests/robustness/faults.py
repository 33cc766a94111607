"""Interrupted runs that are resumed must equal, bit for bit, the same run without interruption.

python -m tests.robustness.faults           # 50 kills, 10 damaged checkpoints, 12 full disks: minutes on one core
python -m tests.robustness.faults --kills 0 --damaged 0 --full 0 --restarts 20 --out faults-torchrun.json

Every run is a process forked from this one that calls the command line. ``--seed`` draws the faults. A kill is a
SIGKILL to the run and its DataLoader workers during a training step, at the end of an epoch, or while a checkpoint is
written. A full disk is a limit on file sizes or a small tmpfs. The resumed run is compared with the uninterrupted run:
weights, queue, optimizer, random state, and every logged number except the speed. Pictures are not drawn. The results
go to ``experiments/results/faults.json``.

With ``--restarts`` runs of two processes are killed one to three times under torchrun's agent, which restarts them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from experiments.runs import RESULTS
from selfsup_xbn.data import datasets
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.environment import environment
from selfsup_xbn.runs.results import write
from tests.finished_runs import differences
from tests.processes import launch, torchrun
from tests.robustness.killed_runs import PLACES, Ended, Kill, run, run_arguments, write_photos


class Campaign:
    """Cases, their random numbers, and the uninterrupted run of each configuration.

    Args:
        folder: Folder of all runs.
        seed: Seed of the faults.

    Attributes:
        cases: One record a case: kind, configuration, whether the runs were equal, and the differences.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        own = [f"{datasets.__name__}.{module.name}" for module in pkgutil.iter_modules(datasets.__path__)]
        for name in ("lightly.transforms", "timm.data", *own):
            importlib.import_module(name)  # once here, not in every run
        self.folder, self.random = folder, random.Random(seed)
        self.arguments = run_arguments(write_photos(folder / "photos"))
        self.cases: list[dict[str, Any]] = []
        self._uninterrupted: dict[str, Ended] = {}

    def uninterrupted(self, cell: str) -> tuple[Path, dict[str, list[float]]]:
        """Return the folder of the uninterrupted run and the seconds of each call; the first call trains it."""
        folder = self.folder / cell
        if cell not in self._uninterrupted:
            self._uninterrupted[cell] = run(self.arguments[cell], folder)
            assert self._uninterrupted[cell].code == 0, self._uninterrupted[cell].printed
        return folder, self._uninterrupted[cell].seconds or {}

    def kill(self, cell: str, place: str) -> None:
        """Kill a run at a random moment at a place, and resume it."""
        folder, seconds = self._folder(), self.uninterrupted(cell)[1][place]
        number, share = self.random.randint(1, len(seconds)), self.random.random()
        delay = share * statistics.median(seconds)
        while run(self.arguments[cell], folder, Kill(place, number, delay)).code == 0:  # it ended before the kill
            shutil.rmtree(folder)
            delay /= 2
        half = any(folder.glob("*.tmp"))
        self._finish(f"killed: {place}", cell, folder, number=number, share=round(share, 3), half_written=half)

    def damage(self, cell: str, how: str) -> None:
        """Kill a run in its last epoch, damage its newest checkpoint, and resume it."""
        folder = self._killed_in_the_last_epoch(cell)
        newest = folder / checkpoint.NAME
        damaged, where = damage(newest.read_bytes(), how, self.random)
        newest.write_bytes(damaged)
        self._finish(f"damaged: {how}", cell, folder, message=f"{newest} is damaged", where=where)

    def fill(self, cell: str, share: float) -> None:
        """Limit a run's files to a share of a checkpoint's size, then resume it without the limit."""
        folder = self._killed_in_the_last_epoch(cell)
        limit = round(share * (folder / checkpoint.NAME).stat().st_size)
        fault = _wrong_refusal(folder, run(self.arguments[cell], folder, file_bytes=limit))
        self._finish("full disk: RLIMIT_FSIZE", cell, folder, fault=fault, limit=limit)

    def fill_tmpfs(self, cell: str, share: float) -> None:
        """Run on a tmpfs with room for two checkpoints and a share of a third, then enlarge it and resume."""
        folder = self._folder()
        size = (self.uninterrupted(cell)[0] / checkpoint.NAME).stat().st_size
        with tmpfs(folder, round((2 + share) * size) + 2**15) as enlarge:
            ended = run(self.arguments[cell], folder / "run")
            fault = _wrong_refusal(folder / "run", ended)
            enlarge()
            self._finish("full disk: tmpfs", cell, folder / "run", fault=fault, share=round(share, 3))

    def kill_under_torchrun(self, cell: str) -> None:
        """Kill random processes of a run of two one to three times; torchrun's agent restarts it each time."""
        folder, whole, logs = self._folder(), self.folder / f"{cell}, two processes", self.folder / "logs"
        if not whole.exists():
            ended = launch(logs, 2, [*self.arguments[cell], "--out", str(whole)])
            assert ended.codes == [0, 0], ended.err
        draw = self.random
        kills = [(draw.randrange(2), draw.randint(1, 9), 0.1 * draw.random()) for _ in range(draw.randint(1, 3))]

        def kill(step: int, rank: int) -> None:
            attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
            if attempt < len(kills) and kills[attempt][:2] == (rank, step):
                # A DataLoader worker that is just being forked dies too: it would keep the agent from seeing the death.
                threading.Timer(kills[attempt][2], os.killpg, (os.getpid(), signal.SIGKILL)).start()

        ended_well = torchrun(logs, 2, [*self.arguments[cell], "--out", str(folder)], kill)
        faults = differences(whole, folder) if ended_well else [(logs / "err-0").read_text()]
        self.cases.append({"kind": "killed under torchrun", "cell": cell, "equal": not faults, "found": faults})
        self.cases[-1]["kills"] = [(rank, step, round(delay, 3)) for rank, step, delay in kills]

    def _folder(self) -> Path:
        return self.folder / f"case {len(self.cases)}"

    def _killed_in_the_last_epoch(self, cell: str) -> Path:
        steps = len(self.uninterrupted(cell)[1]["step"])
        run(self.arguments[cell], self._folder(), Kill("step", steps - 1, 0.0))
        assert len(list(self._folder().glob("checkpoint*.pt"))) == 2
        return self._folder()

    def _finish(self, kind: str, cell: str, folder: Path, message: str = "", fault: str = "", **details: Any) -> None:
        """Resume the run to its end and compare it with the uninterrupted run."""
        ended = run(self.arguments[cell], folder)
        faults = [fault] if fault else []
        if ended.code != 0 or message not in ended.printed:
            faults.append(f"exit code {ended.code}: {ended.printed}")
        else:
            faults += differences(self.uninterrupted(cell)[0], folder)
        self.cases.append({"kind": kind, "cell": cell, "equal": not faults, "found": faults, **details})
        if folder.exists() and not faults:
            shutil.rmtree(folder)


def _wrong_refusal(folder: Path, ended: Ended) -> str:
    """Describe what a run did wrong when the disk was full; return "" if it stopped with one line and no rest."""
    lines = [line for line in ended.printed.splitlines() if line.startswith("error: cannot write ")]
    if ended.code != 2 or len(lines) != 1 or "Traceback" in ended.printed:
        return f"exit code {ended.code}: {ended.printed}"
    return f"left {list(folder.glob('*.tmp'))}" if any(folder.glob("*.tmp")) else ""


def damage(content: bytes, how: str, rng: random.Random) -> tuple[bytes, int]:
    """Return a file's content "truncated", with one bit "flipped", or "empty"; and the position of the damage."""
    if how == "empty":
        return b"", 0
    place = rng.randrange(len(content))
    if how == "truncated":
        return content[:place], place
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :], place


@contextlib.contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """Mount a file system of ``size`` bytes; yield a function that enlarges it to 64 MiB.

    Raises:
        PermissionError: The process may not mount.
    """
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        folder.rmdir()
        raise PermissionError("mounting a tmpfs is not permitted")

    def enlarge() -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)

    try:
        yield enlarge
    finally:
        subprocess.run(["umount", folder], check=True)


def campaign(
    folder: Path, seed: int, kills: int, damaged: int, full: int, names: Sequence[str] = (), restarts: int = 0
) -> list[dict[str, Any]]:
    """Run a number of cases of each kind.

    Args:
        folder: Folder of all runs.
        seed: Seed of the faults.
        kills: Number of killed runs.
        damaged: Number of runs with a damaged checkpoint.
        full: Number of runs with a limit on file sizes; half as many get a small tmpfs where mounting is permitted.
        names: Configurations over which the cases are spread; all by default.
        restarts: Number of runs of two processes that are killed and restarted under torchrun's agent.

    Returns:
        One record a case.
    """
    cases = Campaign(folder, seed)
    names = names or cases.random.sample(list(cases.arguments), len(cases.arguments))
    in_memory = [name for name in names if "workers" not in name]
    for number in range(kills):
        cases.kill(names[number % len(names)], list(PLACES)[(number + number // len(names)) % 3])
    for number in range(restarts):
        cases.kill_under_torchrun(names[number % len(names)])
    for number in range(damaged):
        cases.damage(names[number % len(names)], ("flipped", "truncated", "empty")[number % 3])
    for number in range(full):
        cases.fill(in_memory[number % len(in_memory)], cases.random.random())
    with contextlib.suppress(PermissionError, FileNotFoundError):
        for number in range(full // 2):
            cases.fill_tmpfs(in_memory[number % len(in_memory)], cases.random.random())
    return cases.cases


def counts(cases: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Count cases and equal cases by kind."""
    tried = Counter(case["kind"] for case in cases)
    equal = Counter(case["kind"] for case in cases if case["equal"])
    return {kind: {"tried": tried[kind], "equal": equal[kind]} for kind in tried}


def main() -> None:
    """Run the campaign, write its results, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seed", 0), ("kills", 50), ("damaged", 10), ("full", 8), ("restarts", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", default="faults.json", help="file in experiments/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setattr(Figure, "savefig", lambda *_, **__: None)  # noqa: B010  pictures are no part of a run's state
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        numbers = {"kills": options.kills, "damaged": options.damaged, "full": options.full}
        cases = campaign(Path(folder), options.seed, **numbers, restarts=options.restarts)
    by_kind = counts(cases)
    result = {"label": "faults", **vars(options), "counts": by_kind, "cases": cases, "environment": environment()}
    write(RESULTS / options.out, [result | {"seconds": round(time.perf_counter() - started)}])
    for kind, number in by_kind.items():
        print(f"{kind:<26} tried {number['tried']:>3}, equal {number['equal']:>3}")
    half = sum(case.get("half_written", False) for case in cases)
    print(f"{'all':<26} tried {len(cases):>3}, equal {sum(case['equal'] for case in cases):>3}")
    print(f"{half} of the kills left a half-written file")
    for case in cases:
        if not case["equal"]:
            print(json.dumps(case))


if __name__ == "__main__":
    main()
