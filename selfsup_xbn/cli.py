"""The command line. Torch is imported only when a command runs, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from selfsup_xbn.config.recipes import RECIPES, default_recipe
from selfsup_xbn.config.registry import EVALUATORS, METHODS
from selfsup_xbn.config.schema import EXPORTS, Config, resolved
from selfsup_xbn.errors import Diverged, Interrupted, ProcessLost, UserError, near

EXIT_CODES = (
    "exit codes: 0 done; 2 the input is wrong, or a file cannot be written; 3 the loss diverged; "
    "4 another process of the run was lost; "
    "75 stopped by a signal, go on with --resume; 130 stopped by the keyboard before training"
)


class _Parser(argparse.ArgumentParser):
    """argparse, but a fault is one line, and a mistyped option is answered with the nearest right one."""

    def __init__(self, fill: Callable[[_Parser], None] | None = None, **kwargs: Any) -> None:
        """Make a parser; ``fill`` adds its options when it is used, as they may be in a file that imports torch."""
        super().__init__(**{"allow_abbrev": False} | kwargs)
        self._fill = fill

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse, after the options were added."""
        if self._fill is not None:
            self._fill(self)
            self._fill = None
        return super().parse_known_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(argv)
        if unknown:
            word = unknown[0].split("=")[0]
            parser = options.parser
            known = [option for action in parser._actions for option in action.option_strings]
            parser.error(f"unknown option {word!r}{near(word, known)}" if word[0] == "-" else f"unexpected {word!r}")
        return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    # Threads that spin while they wait take the cores from whatever else runs; to be set before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        options = _parser().parse(sys.argv[1:] if argv is None else argv)
        with _first_process_prints():
            return int(options.command(options) or 0)
    except UserError as error:
        return _fail("error", error, 2)
    except Diverged as error:
        return _fail("diverged", error, 3)
    except ProcessLost as error:
        return _fail("lost", error, 4)
    except Interrupted as error:
        return _fail("interrupted", error, 75)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail("error", error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", "by the keyboard; nothing was being trained", 130)


def _fail(kind: str, error: object, code: int) -> int:
    if not getattr(error, "already_reported", _rank() > 0):
        print(f"{kind}: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _rank() -> int:
    """Number of this process among those that torchrun started."""
    return int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def _first_process_prints() -> Iterator[None]:
    """What the other processes print is dropped; an error that leaves the block is not."""
    if _rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


def _parser() -> _Parser:
    text = "Contrastive and metric learning with a memory that is kept current by XBN and AXBN."
    parser = _Parser(prog="selfsup-xbn", description=text, epilog=EXIT_CODES)
    parser.set_defaults(parser=parser, command=lambda options: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    for mode, entry in METHODS.entries.items():
        commands.add_parser(mode, help=entry.help, epilog=EXIT_CODES, fill=partial(_add_training, mode=mode))
    _add_evaluate(commands.add_parser("evaluate", help="evaluate an encoder", description="Evaluate an encoder."))
    _add_report(commands.add_parser("report", help="make one page of runs", description="One HTML page about runs."))
    _add_export(commands.add_parser("export", help="a run for other programs", description="A run for other programs."))
    return parser


def _add_training(parser: _Parser, mode: str) -> None:
    kind: type[Config] = METHODS[mode]
    parser.description = kind.__doc__
    recipes = [name for name, recipe in RECIPES.items() if type(recipe) is kind]
    parser.add_argument("--recipe", metavar="NAME", help=f"start from named settings: {', '.join(recipes) or 'none'}")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run folder's last checkpoint, if there is one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and what they cost, and stop")
    types = get_type_hints(kind)
    for item in fields(kind):
        _add_option(parser, item, types[item.name])
    parser.set_defaults(parser=parser, command=lambda options: _train(options, kind))


def _add_option(parser: _Parser, item: Field[Any], kind: type) -> None:
    flag, text = (
        "--" + item.name.replace("_", "-"),
        item.metadata["help"].format(names=", ".join(item.metadata["names"])),
    )
    how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    if kind is not bool:
        how = {"type": kind, "metavar": "|".join(item.metadata["choices"]) or kind.__name__.upper()}
        text += f" (default: {item.default!r})" if item.default != "" else ""
    parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)


def config_of(options: argparse.Namespace, kind: type[Config]) -> Config:
    """The recipe (or, when resuming, the run's own settings) with the options given on top."""
    given = {item.name: getattr(options, item.name) for item in fields(kind) if hasattr(options, item.name)}
    recipe = RECIPES.get(options.recipe) if options.recipe else default_recipe(kind.mode)
    if recipe is None or type(recipe) is not kind:
        names = [name for name, other in RECIPES.items() if type(other) is kind]
        raise UserError(
            f"--recipe: expected one of {', '.join(names)}, got {options.recipe!r}{near(options.recipe, names)}"
        )
    config = replace(recipe, **given)
    if options.resume and not options.recipe:
        from selfsup_xbn.runs.folder import holds_run, read_config

        folder = Path(config.run_folder)
        if holds_run(folder) and type(saved := read_config(folder)) is kind:
            return replace(saved, **given)
    return config


def _train(options: argparse.Namespace, kind: type[Config]) -> None:
    config = config_of(options, kind)
    if options.resume and options.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if options.dry_run:
        from selfsup_xbn.commands.dry_run import cost_lines

        print(json.dumps(resolved(config), indent=2))
        print(*cost_lines(config), sep="\n")
        return
    from selfsup_xbn.commands.train import train_run

    lines = train_run(config, resume=options.resume, overwrite=options.overwrite)
    print(*lines, sep="\n", end="\n" * bool(lines))


def _add_evaluate(parser: _Parser) -> None:
    parser.set_defaults(parser=parser, command=lambda options: parser.print_help())
    commands = parser.add_subparsers(title="evaluations", metavar="EVALUATION", parser_class=_Parser)
    options = {item.name: item for item in fields(Config)}
    types = get_type_hints(Config)
    for kind, entry in EVALUATORS.entries.items():
        evaluation = commands.add_parser(kind, help=entry.help, description=entry.help)
        evaluation.add_argument("--run", metavar="DIR", help="folder of a run, whose own settings hold unless given")
        evaluation.add_argument("--best", action="store_true", help="the run's best model by Recall@1, not its last")
        evaluation.add_argument(
            "--weights", metavar="FILE", help="an encoder from elsewhere: torchvision, timm, MoCo, lightly"
        )
        evaluation.add_argument("--backbone", metavar="NAME", help="with --weights: the network")
        for name in ["data", "data_root", "image_size", "limit_train", *entry.options, "device", "workers"]:
            _add_option(evaluation, options[name], types[name])
        evaluation.set_defaults(parser=evaluation, command=_evaluate, kind=kind)


def _evaluate(options: argparse.Namespace) -> None:
    given = {item.name: getattr(options, item.name) for item in fields(Config) if hasattr(options, item.name)}
    given = {name: value for name, value in given.items() if name not in ("weights", "backbone")}
    if bool(options.run) == bool(options.weights):
        raise UserError("expected one of --run DIR and --weights FILE")
    if options.weights and not (options.backbone and "data" in given):
        raise UserError("--weights needs --backbone NAME and --data SPEC")
    if options.run and options.backbone:
        raise UserError("--backbone goes with --weights; a run knows its own")
    from selfsup_xbn.commands.evaluate import evaluate_run, evaluate_weights

    if options.run:
        lines = evaluate_run(options.kind, Path(options.run), given, best=options.best)
    else:
        lines = evaluate_weights(options.kind, options.weights, options.backbone, given)
    print(*lines, sep="\n")


def _add_report(parser: _Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", metavar="DIR", default="report", help="where index.html goes (default: report)")
    parser.set_defaults(parser=parser, command=_report)


def _report(options: argparse.Namespace) -> None:
    from selfsup_xbn.report.page import write_report

    path, notes = write_report([Path(run) for run in options.runs], Path(options.out))
    print(*notes, path, sep="\n")


def _add_export(parser: _Parser) -> None:
    text = (
        "csv: the metrics; torchvision: the backbone's state dict for torchvision's model; safetensors: backbone and "
        "head; onnx: a graph of both"
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--format", required=True, choices=tuple(EXPORTS), help=text)
    parser.add_argument("--out", metavar="FILE", help=f"default: {', '.join(EXPORTS.values())} in the run folder")
    parser.add_argument("--best", action="store_true", help="the run's best model by Recall@1, not its last")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.set_defaults(parser=parser, command=_export)


def _export(options: argparse.Namespace) -> None:
    from selfsup_xbn.commands.export import export_run

    out = Path(options.out) if options.out else None
    print(*export_run(Path(options.run), options.format, out, best=options.best, overwrite=options.overwrite), sep="\n")
