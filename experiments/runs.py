"""Experiments: named lists of cells (configs) on top of ``selfsup-xbn compare``, and tables of their results.

Experiments share runs that have the same settings. Finished runs are not repeated, and interrupted runs are resumed.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfsup_xbn.commands.compare import train_all
from selfsup_xbn.commands.jobs import Job
from selfsup_xbn.config.cells import Cells
from selfsup_xbn.config.command import command_of
from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import Interrupted, UserError
from selfsup_xbn.runs.folder import CONFIG
from selfsup_xbn.runs.results import Result, add, folder_name, outcome, read, value_text

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Experiment:
    """Experiment behind a table or a figure.

    Attributes:
        name: name of its file in ``results/``.
        doc: description for ``--help``.
        scales: cells by name of the scale. The name is ``""`` for an experiment with one scale.
        show: function of the results and their path that returns lines to print and may save charts.
        seeds: default number of seeds.
        scale: default scale.
    """

    name: str
    doc: str
    scales: Mapping[str, Cells]
    show: Callable[[list[Result], Path], Sequence[str]]
    seeds: int = 3
    scale: str = "small"

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
        if not any(options.only in label for label in self.scales[scale]):
            parser.error(f"--only: expected a part of a label out of {list(self.scales[scale])}, got {options.only!r}")
        try:
            if options.collect:
                collect(self.scales[scale], options, path)
            elif not options.from_results:
                run_all(self.scales[scale], options, path)
            print(*self.show(read(path), path), sep="\n")
        except UserError as error:
            parser.error(str(error))
        except Interrupted as error:
            parser.exit(75, f"interrupted: {error}\n")

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if "" not in self.scales:
            text = "scale of the experiment (default %(default)s)"
            parser.add_argument("--scale", choices=list(self.scales), default=self.scale, help=text)
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
    here = {
        label: replace(
            cell,
            data=_spec(options, cell),
            device=options.device,
            compile=options.compile,
            save_every=options.save_every,
        )
        for label, cell in cells.items()
    }
    jobs = [
        Job(label, seed, replace(here[label], seed=seed, out=str(options.folder / folder_name(cells[label], seed))))
        for seed in range(options.seeds)
        for label in cells
        if options.only in label
    ]
    failed = train_all(jobs, cells, path, processes=options.jobs, threads=options.threads)
    if failed:
        raise UserError("; ".join(f"{name}: {error}" for name, error in failed.items()))


def collect(cells: Cells, options: argparse.Namespace, path: Path) -> None:
    """Add every existing run to the results, also unfinished ones."""
    for label, cell in cells.items():
        for seed in range(options.seeds):
            folder = options.folder / folder_name(cell, seed)
            if options.only in label and (folder / CONFIG).exists():
                add(path, cells, label, seed, outcome(folder))


def table(results: Sequence[Result], columns: Mapping[str, str]) -> list[str]:
    """Return a Markdown table with a row for each cell, and mean and standard deviation in each column."""
    lines = ["| | " + " | ".join(columns.values()) + " | seeds |", "|---|" + "---|" * (len(columns) + 1)]
    for result in results:
        cells = [value_text(result, key) for key in columns]
        lines.append(f"| {result['label']} | {' | '.join(cells)} | {len(result['seeds'])} |")
    return lines
