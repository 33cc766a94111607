"""Command line interface. Torch is imported when a command runs, so that ``--help`` is fast."""

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
from selfsup_xbn.utils.launch import launched_rank

EXIT_CODES = (
    "exit codes: 0 success; 2 invalid input, or a file could not be written; 3 the loss diverged; "
    "4 another process of the run was lost; 75 stopped by SIGTERM or SIGINT, continue with --resume; "
    "130 stopped by the keyboard before training"
)


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports errors as a ``UserError`` and suggests corrections of mistyped options.

    Args:
        add_options: Adds the options before the parser is used for the first time. It may import torch.
        kwargs: Arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, add_options: Callable[[_Parser], None] | None = None, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | kwargs)
        self._add_options = add_options

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Add the options if needed, and parse the known arguments."""
        if self._add_options is not None:
            self._add_options(self)
            self._add_options = None
        return super().parse_known_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise a ``UserError`` with a message of ``argparse``."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all arguments.

        Raises:
            UserError: An argument is unknown or invalid.
        """
        options, unknown = self.parse_known_args(argv)
        if unknown:
            word = unknown[0].split("=")[0]
            parser = options.parser
            known = [option for action in parser._actions for option in action.option_strings]
            parser.error(f"unknown option {word!r}{near(word, known)}" if word[0] == "-" else f"unexpected {word!r}")
        return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    Args:
        argv: Arguments without the program name, ``sys.argv[1:]`` by default.
    """
    # Idle OpenMP threads that spin slow other programs down. OpenMP reads the variable when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Torch would print the C++ stack of a connection that another process has closed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
    except BrokenPipeError:  # the reader of a pipe has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail("error", error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", "stopped by the keyboard; no training was in progress", 130)


def _fail(kind: str, error: object, code: int) -> int:
    """Print an error in one line. Before a process group exists, errors of all processes are printed, with the rank."""
    reported = getattr(error, "already_reported", None)
    rank = os.environ.get("RANK", "0")
    if not reported:
        process = f"process {rank}: " if reported is None and rank != "0" else ""
        print(f"{process}{kind}: {' '.join(str(error).split())}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _first_process_prints() -> Iterator[None]:
    """Discard what processes other than the first one print. Exceptions are not affected."""
    if launched_rank() == 0:
        yield
        return
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def _parser() -> _Parser:
    text = "Contrastive and metric learning with a cross-batch memory that is adapted by XBN or AXBN."
    parser = _Parser(prog="selfsup-xbn", description=text, epilog=EXIT_CODES)
    parser.set_defaults(parser=parser, command=lambda options: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    for mode, entry in METHODS.entries.items():
        commands.add_parser(mode, help=entry.help, epilog=EXIT_CODES, add_options=partial(_add_training, mode=mode))
    for name, text, add_options in (
        ("evaluate", "evaluate an encoder", _add_evaluate),
        ("report", "write an HTML page about one or more runs", _add_report),
        ("export", "export a run to a file for other programs", _add_export),
    ):
        add_options(commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}."))
    return parser


def _add_training(parser: _Parser, mode: str) -> None:
    kind: type[Config] = METHODS[mode]
    parser.description = f"{METHODS.entries[mode].help}."
    recipes = [name for name, recipe in RECIPES.items() if type(recipe) is kind]
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"named configuration to start from: {', '.join(recipes) or 'none'}"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in the run folder, if there is one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run in the run folder")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the configuration, the number of steps and the size of the queue, and exit",
    )
    types = get_type_hints(kind)
    for item in fields(kind):
        _add_option(parser, item, types[item.name])
    parser.set_defaults(parser=parser, command=lambda options: _train(options, kind))


def _add_option(parser: _Parser, item: Field[Any], kind: type) -> None:
    flag = "--" + item.name.replace("_", "-")
    text = item.metadata["help"].format(names=", ".join(item.metadata["names"]))
    arguments: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    if kind is not bool:
        arguments = {"type": kind, "metavar": "|".join(item.metadata["choices"]) or kind.__name__.upper()}
        text += f" (default: {item.default!r})" if item.default != "" else ""
    parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **arguments)


def config_of(options: argparse.Namespace, kind: type[Config]) -> Config:
    """Return the configuration that parsed options stand for.

    The options override the recipe or, with ``--resume`` and no ``--recipe``, the configuration of the saved run. Only
    the first process of a distributed run reads the saved run; ``train`` sends its configuration to the others.

    Args:
        options: Parsed options.
        kind: Configuration class of the mode.

    Raises:
        UserError: The recipe is unknown, or an option is invalid.
    """
    overrides = _overrides(options, kind)
    recipe = RECIPES.get(options.recipe) if options.recipe else default_recipe(kind.mode)
    if recipe is None or type(recipe) is not kind:
        names = [name for name, other in RECIPES.items() if type(other) is kind]
        raise UserError(
            f"--recipe: expected one of {', '.join(names)}, got {options.recipe!r}{near(options.recipe, names)}"
        )
    config = replace(recipe, **overrides)
    if options.resume and not options.recipe and launched_rank() == 0:
        from selfsup_xbn.runs.folder import has_run, read_config

        folder = Path(config.run_folder)
        if has_run(folder) and type(saved := read_config(folder)) is kind:
            return replace(saved, **overrides)
    return config


def _overrides(options: argparse.Namespace, kind: type[Config]) -> dict[str, Any]:
    return {item.name: getattr(options, item.name) for item in fields(kind) if hasattr(options, item.name)}


def _train(options: argparse.Namespace, kind: type[Config]) -> None:
    config = config_of(options, kind)
    if options.resume and options.overwrite:
        raise UserError(
            "expected one of --resume and --overwrite, got both: --resume continues a run, --overwrite replaces it"
        )
    if options.dry_run:
        from selfsup_xbn.commands.dry_run import cost_lines

        print(json.dumps(resolved(config), indent=2))
        print(*cost_lines(config), sep="\n")
        return
    from selfsup_xbn.commands.train import train_run

    explicit = None if options.recipe else _overrides(options, kind)
    lines = train_run(config, resume=options.resume, overwrite=options.overwrite, explicit=explicit)
    print(*lines, sep="\n", end="\n" * bool(lines))


def _add_evaluate(parser: _Parser) -> None:
    parser.set_defaults(parser=parser, command=lambda options: parser.print_help())
    commands = parser.add_subparsers(title="evaluations", metavar="EVALUATION", parser_class=_Parser)
    options = {item.name: item for item in fields(Config)}
    types = get_type_hints(Config)
    for kind, entry in EVALUATORS.entries.items():
        evaluation = commands.add_parser(kind, help=entry.help, description=entry.help)
        evaluation.add_argument(
            "--run", metavar="DIR", help="run folder; its configuration is the default of the options"
        )
        evaluation.add_argument(
            "--best", action="store_true", help="use the best model by Recall@1 instead of the last one"
        )
        evaluation.add_argument(
            "--weights", metavar="FILE", help="state dict of a backbone: torchvision, timm, MoCo or lightly"
        )
        evaluation.add_argument("--backbone", metavar="NAME", help="architecture of the backbone in --weights")
        for name in ["data", "data_root", "image_size", "limit_train", *entry.options, "device", "workers"]:
            _add_option(evaluation, options[name], types[name])
        evaluation.set_defaults(parser=evaluation, command=_evaluate, kind=kind)


def _evaluate(options: argparse.Namespace) -> None:
    overrides = _overrides(options, Config)
    overrides = {name: value for name, value in overrides.items() if name not in ("weights", "backbone")}
    if bool(options.run) == bool(options.weights):
        raise UserError(f"expected one of --run DIR and --weights FILE, got {'both' if options.run else 'neither'}")
    if options.weights and not (options.backbone and "data" in overrides):
        raise UserError("--weights requires --backbone NAME and --data SPEC")
    if options.run and options.backbone:
        raise UserError("--backbone is valid with --weights only: the backbone of a run is in its configuration")
    from selfsup_xbn.commands.evaluate import evaluate_run, evaluate_weights

    if options.run:
        lines = evaluate_run(options.kind, Path(options.run), overrides, best=options.best)
    else:
        lines = evaluate_weights(options.kind, options.weights, options.backbone, overrides)
    print(*lines, sep="\n")


def _add_report(parser: _Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", metavar="DIR", default="report", help="directory to write index.html to (default: report)"
    )
    parser.set_defaults(parser=parser, command=_report)


def _report(options: argparse.Namespace) -> None:
    from selfsup_xbn.report.page import write_report

    path, notes = write_report([Path(run) for run in options.runs], Path(options.out))
    print(*notes, path, sep="\n")


def _add_export(parser: _Parser) -> None:
    text = (
        "csv: metrics; torchvision: state dict of the backbone for the model of torchvision; "
        "safetensors: backbone and head; onnx: graph of backbone and head"
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--format", required=True, choices=tuple(EXPORTS), help=text)
    parser.add_argument(
        "--out", metavar="FILE", help=f"output file (default: {', '.join(EXPORTS.values())} in the run folder)"
    )
    parser.add_argument("--best", action="store_true", help="use the best model by Recall@1 instead of the last one")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.set_defaults(parser=parser, command=_export)


def _export(options: argparse.Namespace) -> None:
    from selfsup_xbn.commands.export import export_run

    out = Path(options.out) if options.out else None
    print(*export_run(Path(options.run), options.format, out, best=options.best, overwrite=options.overwrite), sep="\n")
