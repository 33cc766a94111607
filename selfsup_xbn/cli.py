"""Command line interface. Torch is imported when a command runs, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import get_type_hints

from selfsup_xbn import __version__
from selfsup_xbn.commands.evaluate_options import add_evaluate
from selfsup_xbn.commands.options import config_of, overrides_of, recipe_of
from selfsup_xbn.config.cells import cells_of
from selfsup_xbn.config.command import command_of
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.config.registry import EXPORTS, METHODS
from selfsup_xbn.config.schema import Config, options_of_other_modes, resolved
from selfsup_xbn.errors import Diverged, Interrupted, ProcessLost, RunsFailed, UserError, printable
from selfsup_xbn.utils.arguments import AppendNamed, Parser, add_option, early_options
from selfsup_xbn.utils.console import show, show_warning
from selfsup_xbn.utils.launch import launched_rank

EXIT_CODES = (
    "exit codes: 0 success; 2 invalid input, or a file could not be written; 3 the loss diverged; "
    "4 another process of the run was lost; 5 runs of a comparison failed; 75 stopped by SIGTERM or SIGINT, continue "
    "with --resume; 130 stopped by the keyboard before training"
)
EXITS: dict[type[Exception], tuple[str, int]] = {
    UserError: ("error", 2),
    Diverged: ("diverged", 3),
    ProcessLost: ("lost", 4),
    RunsFailed: ("failed", 5),
    Interrupted: ("interrupted", 75),
    OSError: ("error", 2),
}
"""Kind in the message and exit code of each exception that ends a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    Args:
        argv: Arguments without the program name, ``sys.argv[1:]`` by default.
    """
    # Idle OpenMP threads that spin slow other programs down. OpenMP reads the variable when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Torch would print the C++ stack of a connection that another process has closed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.showwarning = show_warning
    try:
        options = _parser().parse(sys.argv[1:] if argv is None else argv)
        with _first_process_prints():
            return int(options.command(options) or 0)
    except BrokenPipeError:  # the reader of a pipe has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except tuple(EXITS) as error:
        return _fail(error, *next(exit for kind, exit in EXITS.items() if isinstance(error, kind)))
    except KeyboardInterrupt:
        return _fail("stopped by the keyboard; no training was in progress", "interrupted", 130)


def _fail(error: object, kind: str, code: int) -> int:
    """Print an error in one line. Before a process group exists, errors of all processes are printed, with the rank."""
    reported = getattr(error, "already_reported", None)
    rank = os.environ.get("RANK") or "0"
    if not reported:
        process = f"process {rank}: " if reported is None and rank != "0" else ""
        print(printable(f"{process}{kind}: {' '.join(str(error).split())}"), file=sys.stderr)
    return code


@contextlib.contextmanager
def _first_process_prints() -> Iterator[None]:
    """Discard what processes other than the first one print. Exceptions are not affected."""
    if launched_rank() == 0:
        yield
        return
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def _parser() -> Parser:
    text = "Contrastive and metric learning with a cross-batch memory that is adapted by XBN or AXBN."
    parser = Parser(prog="selfsup-xbn", description=text, epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(parser=parser, command=lambda options: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for mode, entry in METHODS.entries.items():
        commands.add_parser(mode, help=entry.help, epilog=EXIT_CODES, add_options=partial(_add_training, mode=mode))
    for name, text, add_options in (
        ("compare", "train several configurations with several seeds and compare them", _add_compare),
        ("evaluate", "evaluate an encoder", add_evaluate),
        ("report", "write an HTML page about one or more runs", _add_report),
        ("export", "export a run to a file for other programs", _add_export),
    ):
        add_options(commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}."))
    return parser


def _add_training(parser: Parser, args: Sequence[str], mode: str) -> None:
    kind: type[Config] = METHODS[mode]
    name, base = recipe_of(early_options(args), kind)
    parser.description = f"{METHODS.entries[mode].help}." + (f" Defaults: recipe {name}." if name else "")
    _add_recipe(parser, kind)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in the run folder, if there is one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run in the run folder")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print images and classes, steps, weights, the size of the queue and the configuration, decode all images "
        "of a folder or list, and exit",
    )
    _add_options(parser, base)
    parser.set_defaults(parser=parser, command=lambda options: _train(options, kind))


def _add_recipe(parser: Parser, kind: type[Config]) -> None:
    recipes = [name for name, recipe in RECIPES.items() if type(recipe) is kind]
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"named configuration to start from: {', '.join(recipes) or 'none'}; by default the one for --data",
    )


def _add_options(parser: Parser, base: Config, but: str = "") -> None:
    types = get_type_hints(type(base))
    for item in fields(base):
        if item.name != but:
            add_option(parser, item, types[item.name], getattr(base, item.name))
    parser.elsewhere |= {f"--{name}": hint for name, hint in options_of_other_modes(base).items()}


def _train(options: argparse.Namespace, kind: type[Config]) -> None:
    config = config_of(options, kind)
    if options.resume and options.overwrite:
        raise UserError(
            "expected one of --resume and --overwrite, got both: --resume continues a run, --overwrite replaces it"
        )
    if options.dry_run:
        from selfsup_xbn.commands.dry_run import cost_lines

        show([*cost_lines(config, decode=True), "", *json.dumps(resolved(config), indent=2).splitlines()])
        return
    from selfsup_xbn.commands.train import train_run

    explicit = None if options.recipe else overrides_of(options, kind)
    show(train_run(config, resume=options.resume, overwrite=options.overwrite, explicit=explicit))


COUNTS = (
    ("seeds", 3, "number of seeds, from --seed on"),
    ("jobs", 2, "number of parallel runs"),
    ("threads", 1, "threads of each run"),
)


def _add_compare(parser: Parser) -> None:
    parser.set_defaults(parser=parser, command=lambda options: parser.print_help())
    commands = parser.add_subparsers(title="modes", metavar="MODE", parser_class=Parser)
    for mode, entry in METHODS.entries.items():
        commands.add_parser(mode, help=entry.help, add_options=partial(_add_cells, mode=mode), epilog=EXIT_CODES)


def _add_cells(parser: Parser, args: Sequence[str], mode: str) -> None:
    kind: type[Config] = METHODS[mode]
    parser.description = (
        "Train cells, which are configurations that differ in some options, with several seeds, and compare them with "
        "the first cell. Finished runs are kept and interrupted runs go on, if the command is repeated. Without --vary "
        "and --cell the cells are no memory (supervise), a plain queue and XBN."
    )
    add = partial(parser.add_argument, action=AppendNamed, nargs="+", default=[], dest="cells")
    add(
        "--vary",
        metavar="NAME=VALUE,...",
        help="add a cell for each value of an option, or for each combination of the values of several",
    )
    add("--cell", metavar=("LABEL", "NAME=VALUE"), help="add one cell with a label, and with any number of options")
    for name, default, text in COUNTS:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--out", metavar="DIR", help="folder of the results (default: runs/compare-MODE-DATA)")
    parser.add_argument("--commands", action="store_true", help="print the command of each cell, and exit")
    _add_recipe(parser, kind)
    _add_options(parser, recipe_of(early_options(args), kind)[1], but="out")
    parser.set_defaults(parser=parser, command=lambda options: _compare(options, kind), resume=False)


def _compare(options: argparse.Namespace, kind: type[Config]) -> None:
    for name, *_ in COUNTS:
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    out, options.out = options.out, ""
    base = config_of(options, kind)
    cells = cells_of(base, options.cells)
    if options.commands:
        lines = [line for name, cell in cells.items() for line in (f"# {name}", shlex.join(command_of(cell)))]
        print(*lines, sep="\n")
        return
    from selfsup_xbn.commands.compare import compare

    folder = Path(out or f"runs/compare-{base.mode}-{base.data_name}")
    seeds = range(base.seed, base.seed + options.seeds)
    print(*compare(cells, seeds, folder, processes=options.jobs, threads=options.threads), sep="\n")


def _add_report(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    text = "folder for index.html, which replaces the page of an earlier report (default: report)"
    parser.add_argument("--out", metavar="DIR", default="report", help=text)
    parser.set_defaults(parser=parser, command=_report)


def _report(options: argparse.Namespace) -> None:
    from selfsup_xbn.report.page import NAME, write_report

    earlier = ["replaced the page of an earlier report:"] if (Path(options.out) / NAME).exists() else []
    path, notes = write_report([Path(run) for run in options.runs], Path(options.out))
    show([*notes, *earlier, str(path)])


def _add_export(parser: Parser) -> None:
    text = (
        "csv: metrics; torchvision: state dict of the backbone for the model of torchvision; "
        "safetensors: backbone and head; onnx: graph of backbone and head"
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--format", required=True, choices=tuple(EXPORTS), help=text)
    parser.add_argument(
        "--out", metavar="FILE", help=f"output file (default: {', '.join(EXPORTS.values())} in the run folder)"
    )
    parser.add_argument("--best", action="store_true", help="use the best model, best.pt, instead of the last one")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.set_defaults(parser=parser, command=_export)


def _export(options: argparse.Namespace) -> None:
    from selfsup_xbn.commands.export import export_run

    out = Path(options.out) if options.out else None
    show(export_run(Path(options.run), options.format, out, best=options.best, overwrite=options.overwrite))
