"""Experiments as cells of configs x seeds: trained side by side, kept as one JSON file, shown from that file alone.

A run's folder is named after all that its result depends on, so experiments share the runs that they have in common,
a run that is done is not repeated, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from selfsup_xbn.config.command import command_of
from selfsup_xbn.config.schema import Config, resolved
from selfsup_xbn.errors import UserError
from selfsup_xbn.runs.folder import CONFIG, read_metrics

RESULTS = Path(__file__).parent / "results"
NOT_IN_HISTORY = ("epoch", "step", "seconds", "images_per_second")
Cells = Mapping[str, Config]
Result = dict[str, Any]
"""One cell of a results file: label, config, each seed's last values and their course, mean and deviation."""


@dataclass(frozen=True)
class Experiment:
    """A table or a figure.

    Attributes:
        name: of its file in ``results/``.
        doc: what the command line says of it.
        scales: for each name the cells; an experiment of a single scale has ``""``.
        show: lines to print of the results; may draw a picture beside the file.
        seeds: how many by default.
    """

    name: str
    doc: str
    scales: Mapping[str, Cells]
    show: Callable[[list[Result], Path], Sequence[str]]
    seeds: int = 3

    def main(self, argv: Sequence[str] | None = None) -> None:
        """The command line: trains what is not done, writes the results, shows them."""
        parser = self._parser()
        options = parser.parse_args(argv)
        scale = getattr(options, "scale", "")
        path = RESULTS / f"{self.name}{'-' * bool(scale)}{scale}.json"
        if options.commands:
            for label, cell in self.scales[scale].items():
                command = command_of(replace(cell, data=_spec(options, cell)))
                print(f"# {label}", shlex.join(command), sep="\n")
            return
        try:
            if options.collect:
                collect(self.scales[scale], options, path)
            elif not options.from_results:
                run_all(self.scales[scale], options, path)
            print(*self.show(read(path), path), sep="\n")
        except UserError as error:
            parser.error(str(error))

    def _parser(self) -> argparse.ArgumentParser:
        made = argparse.ArgumentParser(
            description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if "" not in self.scales:
            made.add_argument("--scale", choices=list(self.scales), default="small", help="sizes (default small)")
        made.add_argument("--from-results", action="store_true", help="train nothing, show the committed results")
        made.add_argument("--commands", action="store_true", help="train nothing, print the command of every cell")
        made.add_argument("--collect", action="store_true", help="train nothing, take in what runs have done so far")
        made.add_argument(
            "--data",
            action="append",
            default=[],
            type=_source,
            metavar="NAME=SPEC",
            help="read data set NAME from SPEC, e.g. omniglot=omniglot:PATH or cifar10=folder:PATH; may be repeated",
        )
        made.add_argument("--only", default="", metavar="TEXT", help="only cells with TEXT in their label")
        made.add_argument("--seeds", type=int, default=self.seeds, help=f"seeds 0 to N - 1 (default {self.seeds})")
        made.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
        made.add_argument("--threads", type=int, default=1, help="threads of each (default 1)")
        made.add_argument("--device", default="auto", help="device of all runs (default auto)")
        made.add_argument("--compile", action="store_true", help="torch.compile the networks of all runs")
        made.add_argument("--save-every", default="1", help="epochs or minutes (10m) between checkpoints (default 1)")
        made.add_argument("--folder", type=Path, default=Path("runs"), help="where the runs' folders go (default runs)")
        return made


def _spec(options: argparse.Namespace, cell: Config) -> str:
    """Where the cell's data set is read from: what ``--data`` says, or its usual place."""
    return dict(pair.split("=", 1) for pair in options.data).get(cell.data, cell.data)


def _source(text: str) -> str:
    name, equals, spec = text.partition("=")
    if not (name and equals and spec):
        raise argparse.ArgumentTypeError(f"expected NAME=SPEC, got {text!r}")
    return text


def run_all(cells: Cells, options: argparse.Namespace, path: Path) -> None:
    """Trains every cell with every seed, seed after seed, and adds each run to the results as it ends."""
    jobs = [(label, seed) for seed in range(options.seeds) for label in cells if options.only in label]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {}
        for label, seed in jobs:
            cell = cells[label]
            out = str(options.folder / folder_name(cell, seed))
            here = replace(
                cell,
                seed=seed,
                data=_spec(options, cell),
                out=out,
                device=options.device,
                compile=options.compile,
                save_every=options.save_every,
            )
            waiting[pool.submit(_run, here, options.threads)] = label, seed
        for done in as_completed(waiting):
            label, seed = waiting[done]
            add(path, cells, label, seed, done.result())
            print(f"{label}, seed {seed}: done", flush=True)


def folder_name(config: Config, seed: int) -> str:
    """A name that any two runs with other results differ in."""
    digest = hashlib.sha256(json.dumps(settings(config), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.data}-{config.adaptation}-b{config.batch_size}-{digest}-{seed}"


def settings(config: Config) -> dict[str, Any]:
    """What a cell's results depend on, but for the seed and for where a machine keeps the data."""
    shown = {item.name for item in fields(config) if item.metadata["affects_results"]} - {"seed"}
    return {name: value for name, value in resolved(config).items() if name in shown | {"mode"}}


def _run(config: Config, threads: int) -> dict[str, Any]:
    """The course of all that the run logged, the seconds that it took, and where."""
    import torch

    from selfsup_xbn.commands.train import train_run

    torch.set_num_threads(threads)
    folder = Path(config.out)
    if not (folder / "seconds.txt").exists():
        started = time.perf_counter()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log):
            train_run(config, resume=True)
        (folder / "seconds.txt").write_text(f"{time.perf_counter() - started:.1f}\n")
    return _outcome(folder)


def _outcome(folder: Path) -> dict[str, Any]:
    """What a run has logged, where, and its seconds: 0 as long as it is not done."""
    seconds = folder / "seconds.txt"
    return {
        "records": read_metrics(folder),
        "seconds": float(seconds.read_text()) if seconds.exists() else 0.0,
        "environment": json.loads((folder / CONFIG).read_text())["environment"],
    }


def collect(cells: Cells, options: argparse.Namespace, path: Path) -> None:
    """Adds every run that has begun to the results, as far as it has come."""
    for label, cell in cells.items():
        for seed in range(options.seeds):
            folder = options.folder / folder_name(cell, seed)
            if options.only in label and (folder / CONFIG).exists():
                add(path, cells, label, seed, _outcome(folder))


def add(path: Path, cells: Cells, label: str, seed: int, run: dict[str, Any]) -> None:
    """Puts one run into a results file; other runs of cells with the same settings stay."""
    results = {result["label"]: result for result in (read(path) if path.exists() else [])}
    results = {name: result for name, result in results.items() if name in cells}
    result = results.get(label)
    if result is None or result["config"] != settings(cells[label]):
        result = {"label": label, "config": settings(cells[label]), "seeds": {}, "history": {}}
    values: dict[str, Any] = {}
    for record in run["records"]:
        values |= record
    result["seeds"][str(seed)] = values | {"seconds": run["seconds"], "environment": run["environment"]}
    result["history"][str(seed)] = _history(run["records"])
    results[label] = result | _summary(result["seeds"])
    write(path, [results[name] for name in cells if name in results])


def _history(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each name its values by epoch."""
    names = dict.fromkeys(name for record in records for name in record if name not in NOT_IN_HISTORY)
    return {name: {str(r["epoch"]): r[name] for r in records if name in r} for name in names}


def _summary(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation over the seeds of each last value."""
    names = dict.fromkeys(name for found in seeds.values() for name, v in found.items() if isinstance(v, int | float))
    values = {name: [found[name] for found in seeds.values() if found.get(name) is not None] for name in names}
    return {
        "mean": {name: round(statistics.mean(v), 4) for name, v in values.items()},
        "std": {name: round(statistics.stdev(v), 4) if len(v) > 1 else None for name, v in values.items()},
    }


def write(path: Path, results: Sequence[Result]) -> None:
    """A results file, an object a line."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")


def read(path: Path) -> list[Result]:
    """The cells of a results file.

    Raises:
        UserError: there is none.
    """
    if not path.exists():
        raise UserError(f"no results in {path}: run the experiment without --from-results")
    found: list[Result] = json.loads(path.read_text())
    return found


def table(results: Sequence[Result], columns: Mapping[str, str]) -> list[str]:
    """A Markdown table: a row a cell, mean and standard deviation over the seeds in each column."""
    lines = ["| | " + " | ".join(columns.values()) + " | seeds |", "|---|" + "---|" * (len(columns) + 1)]
    for result in results:
        cells = [value_text(result, key) for key in columns]
        lines.append(f"| {result['label']} | " + " | ".join(cells) + f" | {len(result['seeds'])} |")
    return lines


def value_text(result: Result, key: str) -> str:
    """Mean ± standard deviation of a cell's value, or a dash."""
    mean, std = result["mean"].get(key), result["std"].get(key)
    return "-" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")
