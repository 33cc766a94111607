"""Measure the time and memory of the steps and evaluators of the package and of the installed peers.

    python -m experiments.benchmarks [WORK ...] [--rounds 7] [--device cpu] [--threads 2]

Each implementation runs in a separate process. In a round the processes run one after the other, so that a change of
the machine's load affects all of them. Times are medians over the rounds, ratios are medians of the ratios within a
round, and memory is the maximum. A work with a goal is repeated with new processes up to five times if that is short,
because times depend on the memory layout of a process. The results are written to ``results/benchmarks-DEVICE.json``,
where works that are not measured keep their values. The program prints tables and goals, for example::

    | supervised-29775 | time | x bare | memory beyond inputs | peak |
    |---|---|---|---|---|
    | bare | 38.8 ms | 1.00 | 18 MB | 625 MB |
    | ours, XBN | 37.9 ms | 0.99 | 53 MB | 664 MB |
    | ours, XBM | 37 ms | 0.96 | 56 MB | 667 MB |
    | ours, XBN, moment gradient | 74.7 ms | 1.94 | 50 MB | 661 MB |
    | pytorch-metric-learning | 204 ms | 5.07 | 236 MB | 904 MB |

    met      supervised-29775: ours, XBN at most 1.6 x bare: 0.99
    met      supervised-200000: ours, XBN at most 1.4 x bare: 0.88
    met      supervised-200000: ours, XBN at most 64 MB more than the inputs: 31.69
    NOT MET  moco-4096: ours, XBN at most 1.1 x plain: 1.14
    met      moco-65536: ours, XBN at most 0.9 x plain: 0.30
    NOT MET  memory-4096: XBN at most 1.03 x XBM: 1.08
    met      memory-65536: XBN at most 1.03 x XBM: 1.00
    met      memory-262144: XBN at most 1.03 x XBM: 1.01
    met      memory-1000000: XBN at most 1.03 x XBM: 1.01
    NOT MET  knn: ours at most 1 x faiss-cpu: 1.13
    met      recall: ours at most 1 x faiss-cpu: 0.79
    met      recall: ours at most 1200 MB peak: 913.42
    met      import: torch, selfsup_xbn at most 0.3 s more than torch: 0.04
    met      import: selfsup-xbn --help at most 1 s: 0.08

These values are from two cores of an AMD EPYC, where all works took 41 minutes. ``step_parts`` and ``knn_parts`` divide
the time of two works into parts. On a machine with other load, ratios near a limit are unreliable.
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
from experiments.pictures import Chart, save_chart
from experiments.runs import RESULTS
from selfsup_xbn.errors import near
from selfsup_xbn.runs.environment import environment

Measurements = dict[str, dict[str, Any]]
"""Rounds, seconds and bytes by implementation."""
REPETITIONS, SHORT_SECONDS = 5, 180
AXES = {"M": "rows of the queue M", "D": "dimensions D", "B": "batch size B", "N": "images N"}
SHOWN = ("device", "processor", "torch", "lightly", "pytorch-metric-learning", "scikit-learn", "faiss-cpu", "commit")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the named works, by default all; write the results and print them."""
    parser = _parser()
    options = parser.parse_args(argv)
    suffix = "" if options.scale == 1 else f"-scale-{options.scale:g}"
    path: Path = options.out / f"benchmarks-{options.device}{suffix}.json"
    named = {name: [work for work in works() if work.startswith(name)] for name in options.works or [""]}
    for name in [name for name in named if not named[name]]:
        parser.error(f"expected the beginning of the name of a work, got {name!r}{near(name, works())}")
    selected = [work for work in works() if work in itertools.chain(*named.values())]
    if options.from_results and not path.exists():
        parser.error(f"no results in {path}; run without --from-results")
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    measured_with = {"threads": options.threads, "environment": environment() | device_name(options.device)}
    for work in [] if options.from_results else selected:
        results[work] = {"names": measure(work, options), **measured_with}
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(*table(work, results[work]["names"]), "", sep="\n", flush=True)
    if options.from_results:
        for work in [work for work in selected if work in results]:
            print(*table(work, results[work]["names"]), "", sep="\n")
    print(*summary(results), "", *measured_on(results), "", sep="\n")
    draw_scaling(results, path.with_name(f"scaling-{options.device}{suffix}.png"))
    goals = [goal for goal in GOALS if goal.work in results and goal.device == options.device]
    print(*(verdict(goal, results[goal.work]["names"]) for goal in goals), sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "works", nargs="*", metavar="WORK", help=f"works whose name begins with WORK: {', '.join(works())}"
    )
    parser.add_argument("--rounds", type=int, default=7, help="minimum number of rounds (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default 2)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="scale of the evaluators' sizes; changes the names of the result files"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--from-results", action="store_true", help="print and draw the committed results without measuring"
    )
    return parser


def measure(work: str, options: argparse.Namespace) -> Measurements:
    """Return the seconds of each round and the bytes of every implementation of a work."""
    measurements: Measurements = {}
    started = time.monotonic()
    has_goal = any((goal.work, goal.device) == (work, options.device) for goal in GOALS)
    for _ in range(REPETITIONS if has_goal else 1):
        workers = {name: Worker(work, name, options) for name in works(options.device)[work]}
        for _, (name, worker) in itertools.product(range(options.rounds), workers.items()):
            if worker.present:
                _add_round(measurements.setdefault(name, {"rounds": []}), worker.round())
        for worker in workers.values():
            worker.end()
        if time.monotonic() - started > SHORT_SECONDS:
            break
    return {name: values | {"seconds": statistics.median(values["rounds"])} for name, values in measurements.items()}


def _add_round(values: dict[str, Any], answer: dict[str, Any]) -> None:
    """Append the seconds of a round, and keep the maximum of each memory value."""
    values["rounds"].append(round(answer.pop("seconds"), 7))
    for name, measured in answer.items():
        values[name] = max(measured, values.get(name, 0))


class Worker:
    """Process that runs one implementation of a work on request.

    Args:
        work: name of the work.
        name: name of the implementation.
        options: options of the command line.
    """

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
        """Run one round; return the seconds of a call and the bytes."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def device_name(device: str) -> dict[str, str]:
    """Return the name of an accelerator."""
    if device == "cpu":
        return {}
    import torch

    return {"device": torch.cuda.get_device_name(device)}


def table(work: str, measurements: Measurements) -> list[str]:
    """Return a Markdown table of one work. Ratios are relative to its first implementation."""
    first = next(iter(measurements.values()))
    lines = [f"| {work} | time | x {next(iter(measurements))} | memory beyond inputs | peak |", "|---|---|---|---|---|"]
    for name, values in measurements.items():
        sizes = [values.get(key) for key in ("extra_bytes", "peak_bytes")]
        memory = " | ".join("-" if size is None else f"{size / 2**20:.0f} MB" for size in sizes)
        lines.append(f"| {name} | {_time(values['seconds'])} | {ratio(values, [first]):.2f} | {memory} |")
    return lines


def ratio(values: dict[str, Any], others: list[dict[str, Any]]) -> float:
    """Return the ratio of the time to the sum of the other times, as the median over the rounds."""
    rounds = zip(values["rounds"], *(other["rounds"] for other in others), strict=True)
    return statistics.median(seconds / sum(other_seconds) for seconds, *other_seconds in rounds)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def summary(results: dict[str, Any]) -> list[str]:
    """Return a Markdown table of all works: time, and memory beyond the inputs."""
    lines = ["| work | ours | bare products | peers |", "|---|---|---|---|"]
    for work, title in TITLES.items():
        if work not in results:
            continue
        names = results[work]["names"]
        shown = {
            name: f"{_time(values['seconds'])}, {values['extra_bytes'] / 2**20:.0f} MB"
            for name, values in names.items()
        }
        own = shown.get("ours, XBN") or shown["ours"]
        known = ("bare", "copy", "ours")
        peers = [f"{name} {text}" for name, text in shown.items() if not name.startswith(known)]
        lines.append(f"| {title} | {own} | {shown.get('bare', '-').partition(',')[0]} | {'; '.join(peers)} |")
    return lines


def measured_on(results: dict[str, Any]) -> list[str]:
    """Return a line for each environment of the measurements: machine, versions, commit."""
    works_of: dict[str, list[str]] = {}
    for work, values in results.items():
        about = [f"{values['threads']} threads"]
        about += [f"{name} {value}" for name, value in values["environment"].items() if name in SHOWN]
        works_of.setdefault(", ".join(about), []).append(work)
    common = max(works_of, key=lambda setting: len(works_of[setting]), default="")
    return [
        f"Measured with {setting}" + ("" if setting == common else f": {', '.join(works)}")
        for setting, works in works_of.items()
    ]


def draw_scaling(results: dict[str, Any], path: Path) -> None:
    """Save charts of the time and of the memory beyond the inputs against each size that was measured."""
    charts = []
    for axis, unit in itertools.product(AXES, ("seconds", "extra_bytes")):
        sizes = sorted(int(work.rpartition("-")[2]) for work in results if work.startswith(f"scale-{axis}-"))
        at = [results[f"scale-{axis}-{size}"]["names"] for size in sizes]
        scale = 1e3 if unit == "seconds" else 2**-20
        # A logarithmic axis cannot show 0.
        points = {name: [values[name][unit] * scale or math.nan for values in at] for name in (at[0] if at else ())}
        work = "retrieval" if axis == "N" else "loss step"
        lines = {f"{work}, {name}": (values, [0.0] * len(at)) for name, values in points.items()}
        y_label = "time [ms]" if unit == "seconds" else "memory beyond the inputs [MB]"
        charts.append(Chart(f"{work}: {y_label.partition(' [')[0]} against {axis}", AXES[axis], y_label, sizes, lines))
    if any(chart.curves for chart in charts):
        save_chart(path, "Time and memory, both axes logarithmic", charts, log=True, both=True, legend_columns=2)


def verdict(goal: Goal, measurements: Measurements) -> str:
    """Return a line with the value of a goal and whether the goal was met."""
    others = goal.than.split(" + ") if goal.than else []
    if missing := [name for name in (goal.name, *others) if name not in measurements]:
        return f"missing  {goal.work}: {missing[0]} was not measured"
    values = measurements[goal.name]
    if goal.unit == "x":
        value = ratio(values, [measurements[name] for name in others])
    elif goal.unit.startswith("MB"):
        value = values["peak_bytes" if "peak" in goal.unit else "extra_bytes"] / 2**20
    else:
        value = values["seconds"] - sum(measurements[name]["seconds"] for name in others)
    status = "met     " if value <= goal.limit else "NOT MET "
    limit = f"{goal.limit:g} {goal.unit} {goal.than}".rstrip()
    return f"{status} {goal.work}: {goal.name} at most {limit}: {value:.2f}"


if __name__ == "__main__":
    main()
