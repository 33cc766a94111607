"""Speed and memory of everything that the package does again and again, beside every peer that is installed.

    python -m experiments.benchmarks [WORK ...] [--rounds 7] [--device cpu] [--threads 2]

Each implementation has a process of its own. They take turns, one works while all others wait, so that the machine's
moods meet them alike; times are medians over the rounds, ratios are medians of those within a round, memory is the
largest. A work with a goal has up to five sittings, if they are short, each with new processes: where a process's
memory comes to lie makes a difference too. Writes ``results/benchmarks-DEVICE.json`` (works that are not measured this
time keep their numbers) and prints a table and the goals, e.g. ::

    | supervised-29775 | time | x bare | memory beyond inputs | peak |
    |---|---|---|---|---|
    | bare | 37.2 ms | 1.00 | 18 MB | 625 MB |
    | ours, XBN | 40.6 ms | 1.09 | 30 MB | 642 MB |
    | ours, XBM | 40.2 ms | 1.08 | 33 MB | 645 MB |
    | pytorch-metric-learning | 193 ms | 5.11 | 244 MB | 911 MB |

    met      supervised-29775: ours, XBN at most 1.6 x bare: 1.09
    met      supervised-200000: ours, XBN at most 1.4 x bare: 1.04
    met      supervised-200000: ours, XBN at most 64 MB more than the inputs: 40.71
    met      moco-4096: ours, XBN at most 1.1 x plain: 1.01
    met      moco-65536: ours, XBN at most 0.9 x plain: 0.40
    met      memory-4096: XBN at most 1.03 x XBM: 1.01
    met      memory-65536: XBN at most 1.03 x XBM: 0.98
    met      memory-262144: XBN at most 1.03 x XBM: 0.99
    met      memory-1000000: XBN at most 1.03 x XBM: 1.00
    NOT MET  knn: ours at most 1 x faiss-cpu: 1.14
    met      recall: ours at most 1 x faiss-cpu: 0.79
    met      recall: ours at most 1200 MB peak: 916.47
    met      import: torch, selfsup_xbn at most 0.3 s more than torch: 0.02
    met      import: selfsup-xbn --help at most 1 s: 0.07

This was on two cores of an AMD EPYC, where all works together took 39 minutes. ``step_parts`` and ``knn_parts`` show
where the time of two works goes. Measure on a quiet machine; on a shared one ratios near a limit move.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.works import GOALS, TITLES, Goal, works
from experiments.pictures import save_chart
from experiments.runs import RESULTS
from selfsup_xbn.errors import near
from selfsup_xbn.runs.environment import environment

Found = dict[str, dict[str, Any]]
SITTINGS, SHORT_SECONDS = 5, 180
SHOWN = ("device", "processor", "torch", "lightly", "pytorch-metric-learning", "scikit-learn", "faiss-cpu", "commit")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the works that were named, or all; writes and prints what was found."""
    parser = _parser()
    options = parser.parse_args(argv)
    tried_out = "" if options.scale == 1 else f"-scale-{options.scale:g}"
    path: Path = options.out / f"benchmarks-{options.device}{tried_out}.json"
    named = {name: [work for work in works() if work.startswith(name)] for name in options.works or [""]}
    for name in [name for name in named if not named[name]]:
        parser.error(f"no work's name begins with {name!r}{near(name, works())}")
    wanted = [work for work in works() if work in itertools.chain(*named.values())]
    if options.from_results and not path.exists():
        parser.error(f"no results in {path}")
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    measured_with = {"threads": options.threads, "environment": environment() | device_name(options.device)}
    for work in [] if options.from_results else wanted:
        found[work] = {"names": measure(work, options), **measured_with}
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(*table(work, found[work]["names"]), "", sep="\n", flush=True)
    if options.from_results:
        for work in [work for work in wanted if work in found]:
            print(*table(work, found[work]["names"]), "", sep="\n")
    print(*summary(found), "", *measured_on(found), "", sep="\n")
    draw_scaling(found, path.with_name(f"scaling-{options.device}{tried_out}.png"))
    goals = [goal for goal in GOALS if goal.work in found and goal.device == options.device]
    print(*(verdict(goal, found[goal.work]["names"]) for goal in goals), sep="\n")


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("works", nargs="*", metavar="WORK", help=f"all whose name begins so: {', '.join(works())}")
    made.add_argument("--rounds", type=int, default=7, help="rounds of each, at least (default 7)")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    made.add_argument("--threads", type=int, default=2, help="threads of each process (default 2)")
    made.add_argument("--scale", type=float, default=1.0, help="size of the evaluators' work; other results' names")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    made.add_argument("--from-results", action="store_true", help="measure nothing, print and draw what was measured")
    return made


def measure(work: str, options: argparse.Namespace) -> Found:
    """Every implementation of a work, in turns: seconds of each round, memory in bytes."""
    found: Found = {}
    started = time.monotonic()
    has_goal = any((goal.work, goal.device) == (work, options.device) for goal in GOALS)
    for _ in range(SITTINGS if has_goal else 1):
        workers = {name: Worker(work, name, options) for name in works(options.device)[work]}
        for _, (name, worker) in itertools.product(range(options.rounds), workers.items()):
            if worker.present:
                _take_in(found.setdefault(name, {"rounds": []}), worker.round())
        for worker in workers.values():
            worker.end()
        if time.monotonic() - started > SHORT_SECONDS:
            break
    return {name: values | {"seconds": statistics.median(values["rounds"])} for name, values in found.items()}


def _take_in(values: dict[str, Any], answer: dict[str, Any]) -> None:
    """A round's seconds beside those before; of each measure of memory the largest."""
    values["rounds"].append(round(answer.pop("seconds"), 7))
    for name, measured in answer.items():
        values[name] = max(measured, values.get(name, 0))


class Worker:
    """A process that does one work of one implementation when it is told to."""

    def __init__(self, work: str, name: str, options: argparse.Namespace) -> None:
        self.name = f"{work}: {name}"
        arguments = [work, name, options.device, str(options.threads), str(options.scale)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.present = self._answer().get("ready", False)

    def round(self) -> dict[str, Any]:
        """One round: seconds of a call, and memory."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Lets the process go."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def device_name(device: str) -> dict[str, str]:
    """What the device is called, where it is not the processor."""
    if device == "cpu":
        return {}
    import torch

    return {"device": torch.cuda.get_device_name(device)}


def table(work: str, found: Found) -> list[str]:
    """A Markdown table of one work; ratios are to its first implementation."""
    first = next(iter(found.values()))
    lines = [f"| {work} | time | x {next(iter(found))} | memory beyond inputs | peak |", "|---|---|---|---|---|"]
    for name, values in found.items():
        sizes = [values.get(key) for key in ("extra_bytes", "peak_bytes")]
        memory = " | ".join("-" if size is None else f"{size / 2**20:.0f} MB" for size in sizes)
        lines.append(f"| {name} | {_time(values['seconds'])} | {ratio(values, [first]):.2f} | {memory} |")
    return lines


def ratio(values: dict[str, Any], others: list[dict[str, Any]]) -> float:
    """How many times as long as the others together: the median over rounds, in each of which all had their turn."""
    rounds = zip(values["rounds"], *(other["rounds"] for other in others), strict=True)
    return statistics.median(seconds / sum(theirs) for seconds, *theirs in rounds)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def summary(found: Found) -> list[str]:
    """The README's table: time, and memory beyond the inputs."""
    lines = ["| work | ours | bare products | peers |", "|---|---|---|---|"]
    for work, title in TITLES.items():
        if work not in found:
            continue
        names = found[work]["names"]
        shown = {
            name: f"{_time(values['seconds'])}, {values['extra_bytes'] / 2**20:.0f} MB"
            for name, values in names.items()
        }
        own = shown.get("ours, XBN") or shown["ours"]
        known = ("bare", "copy", "ours")
        peers = [f"{name} {text}" for name, text in shown.items() if not name.startswith(known)]
        lines.append(f"| {title} | {own} | {shown.get('bare', '-').partition(',')[0]} | {'; '.join(peers)} |")
    return lines


def measured_on(found: Found) -> list[str]:
    """A line for each setting that works were measured in: machine, versions, commit."""
    works_of: dict[str, list[str]] = {}
    for work, values in found.items():
        about = [f"{values['threads']} threads"]
        about += [f"{name} {value}" for name, value in values["environment"].items() if name in SHOWN]
        works_of.setdefault(", ".join(about), []).append(work)
    most = max(works_of, key=lambda setting: len(works_of[setting]), default="")
    return [
        f"Measured with {setting}" + ("" if setting == most else f": {', '.join(works)}")
        for setting, works in works_of.items()
    ]


def draw_scaling(found: Found, path: Path) -> None:
    """Time and memory beyond the inputs against each size, where any was measured."""
    charts, titles = [], []
    for axis, unit in itertools.product("MDBN", ("seconds", "extra_bytes")):
        sizes = sorted(int(work.rpartition("-")[2]) for work in found if work.startswith(f"scale-{axis}-"))
        at = [found[f"scale-{axis}-{size}"]["names"] for size in sizes]
        scale = 1e3 if unit == "seconds" else 2**-20
        # No memory at all has no place on a logarithmic axis.
        points = {name: [values[name][unit] * scale or math.nan for values in at] for name in (at[0] if at else ())}
        lines = {name: (values, [0.0] * len(at)) for name, values in points.items()}
        charts.append((axis, sizes, lines))
        titles.append(f"{'time [ms]' if unit == 'seconds' else 'memory beyond inputs [MB]'} against {axis}")
    if any(lines for *_, lines in charts):
        save_chart(path, charts, "", titles=titles, log=True, both=True)


def verdict(goal: Goal, found: Found) -> str:
    """A line that says whether a goal was met, and by how much."""
    others = goal.than.split(" + ") if goal.than else []
    if missing := [name for name in (goal.name, *others) if name not in found]:
        return f"missing  {goal.work}: {missing[0]} was not measured"
    values = found[goal.name]
    if goal.unit == "x":
        value = ratio(values, [found[name] for name in others])
    elif goal.unit.startswith("MB"):
        value = values["peak_bytes" if "peak" in goal.unit else "extra_bytes"] / 2**20
    else:
        value = values["seconds"] - sum(found[name]["seconds"] for name in others)
    said = "met     " if value <= goal.limit else "NOT MET "
    limit = f"{goal.limit:g} {goal.unit} {goal.than}".rstrip()
    return f"{said} {goal.work}: {goal.name} at most {limit}: {value:.2f}"


if __name__ == "__main__":
    main()
