"""Run experiments: train cells (configs) with several seeds, collect the results in a JSON file, and print them.

The name of a run's folder contains a hash of all settings that its result depends on. Experiments therefore share runs.
Finished runs are not repeated, and interrupted runs are resumed.
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
"""One cell of a results file: label, config, last values and history of each seed, mean and standard deviation."""


@dataclass(frozen=True)
class Experiment:
    """Experiment behind a table or a figure.

    Attributes:
        name: name of its file in ``results/``.
        doc: description for ``--help``.
        scales: cells by name of the scale. The name is ``""`` for an experiment with one scale.
        show: function of the results and their path that returns lines to print and may save charts.
        seeds: default number of seeds.
    """

    name: str
    doc: str
    scales: Mapping[str, Cells]
    show: Callable[[list[Result], Path], Sequence[str]]
    seeds: int = 3

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Run the command line: train the missing runs, write the results and print them."""
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
        parser = argparse.ArgumentParser(
            description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if "" not in self.scales:
            parser.add_argument(
                "--scale", choices=list(self.scales), default="small", help="scale of the experiment (default small)"
            )
        parser.add_argument("--from-results", action="store_true", help="print the committed results without training")
        parser.add_argument("--commands", action="store_true", help="print the command of every cell without training")
        parser.add_argument("--collect", action="store_true", help="add the results of existing runs without training")
        parser.add_argument(
            "--data",
            action="append",
            default=[],
            type=_source,
            metavar="NAME=SPEC",
            help="source of data set NAME, e.g. omniglot=omniglot:PATH or cifar10=folder:PATH; may be repeated",
        )
        parser.add_argument("--only", default="", metavar="TEXT", help="use only cells with TEXT in their label")
        parser.add_argument("--seeds", type=int, default=self.seeds, help=f"number of seeds (default {self.seeds})")
        parser.add_argument("--jobs", type=int, default=2, help="number of parallel runs (default 2)")
        parser.add_argument("--threads", type=int, default=1, help="threads of each run (default 1)")
        parser.add_argument("--device", default="auto", help="device of all runs (default auto)")
        parser.add_argument("--compile", action="store_true", help="torch.compile the networks of all runs")
        parser.add_argument("--save-every", default="1", help="epochs or minutes (10m) between checkpoints (default 1)")
        parser.add_argument(
            "--folder", type=Path, default=Path("runs"), help="parent of the run folders (default runs)"
        )
        return parser


def _spec(options: argparse.Namespace, cell: Config) -> str:
    """Return the source of the cell's data set: that of ``--data``, or the default one."""
    return dict(pair.split("=", 1) for pair in options.data).get(cell.data, cell.data)


def _source(text: str) -> str:
    name, equals, spec = text.partition("=")
    if not (name and equals and spec):
        raise argparse.ArgumentTypeError(f"expected NAME=SPEC, got {text!r}")
    return text


def run_all(cells: Cells, options: argparse.Namespace, path: Path) -> None:
    """Train every cell with every seed, and add each run to the results when it ends."""
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
    """Return a folder name that is unique for the settings of a run and its seed."""
    digest = hashlib.sha256(json.dumps(settings(config), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.data}-{config.adaptation}-b{config.batch_size}-{digest}-{seed}"


def settings(config: Config) -> dict[str, Any]:
    """Return the settings that the results of a cell depend on, without the seed and the path of the data."""
    names = {item.name for item in fields(config) if item.metadata["affects_results"]} - {"seed"}
    if config.accumulate == 1:  # cells from before this option keep their names
        names.discard("accumulate")
    return {name: value for name, value in resolved(config).items() if name in names | {"mode"}}


def _run(config: Config, threads: int) -> dict[str, Any]:
    """Train a run if necessary; return its records, duration in seconds and environment."""
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
    """Return the records of a run, its environment, and its duration in seconds, 0 for an unfinished run."""
    seconds = folder / "seconds.txt"
    return {
        "records": read_metrics(folder),
        "seconds": float(seconds.read_text()) if seconds.exists() else 0.0,
        "environment": json.loads((folder / CONFIG).read_text())["environment"],
    }


def collect(cells: Cells, options: argparse.Namespace, path: Path) -> None:
    """Add every existing run to the results, also unfinished ones."""
    for label, cell in cells.items():
        for seed in range(options.seeds):
            folder = options.folder / folder_name(cell, seed)
            if options.only in label and (folder / CONFIG).exists():
                add(path, cells, label, seed, _outcome(folder))


def add(path: Path, cells: Cells, label: str, seed: int, run: dict[str, Any]) -> None:
    """Add one run to a results file. Runs of cells whose settings have changed are removed."""
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
    """Return the values by name and epoch."""
    names = dict.fromkeys(name for record in records for name in record if name not in NOT_IN_HISTORY)
    return {name: {str(r["epoch"]): r[name] for r in records if name in r} for name in names}


def _summary(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the mean and the standard deviation over the seeds of each last value."""
    names = dict.fromkeys(name for final in seeds.values() for name, v in final.items() if isinstance(v, int | float))
    values = {name: [final[name] for final in seeds.values() if final.get(name) is not None] for name in names}
    return {
        "mean": {name: round(statistics.mean(v), 4) for name, v in values.items()},
        "std": {name: round(statistics.stdev(v), 4) if len(v) > 1 else None for name, v in values.items()},
    }


def write(path: Path, results: Sequence[Result]) -> None:
    """Write a results file with one JSON object a line."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")


def read(path: Path) -> list[Result]:
    """Return the cells of a results file.

    Raises:
        UserError: the file does not exist.
    """
    if not path.exists():
        raise UserError(f"no results in {path}; run the experiment without --from-results")
    results: list[Result] = json.loads(path.read_text())
    return results


def table(results: Sequence[Result], columns: Mapping[str, str]) -> list[str]:
    """Return a Markdown table with a row for each cell, and mean and standard deviation in each column."""
    lines = ["| | " + " | ".join(columns.values()) + " | seeds |", "|---|" + "---|" * (len(columns) + 1)]
    for result in results:
        cells = [value_text(result, key) for key in columns]
        lines.append(f"| {result['label']} | " + " | ".join(cells) + f" | {len(result['seeds'])} |")
    return lines


def value_text(result: Result, key: str) -> str:
    """Return "mean ± standard deviation" of a value, or a dash if it is missing."""
    mean, std = result["mean"].get(key), result["std"].get(key)
    return "-" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")
