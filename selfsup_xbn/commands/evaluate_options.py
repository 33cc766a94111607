"""Options of ``evaluate``. This module does not import torch, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from selfsup_xbn.commands.options import overrides_of
from selfsup_xbn.config.registry import EVALUATORS
from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import UserError
from selfsup_xbn.utils.arguments import Parser, add_option
from selfsup_xbn.utils.console import show

OPTIONS = (
    *("partial_weights", "data", "data_root", "split_classes", "image_size", "mean", "std", "limit_train"),
    "limit_test",
)
NOTES = {"data": ("", "with --run: that of the run; required with --weights"), "partial_weights": (False, "")}
"""Default, and text after it, that ``--help`` shows for options whose default is not simply that of the run."""


def add_evaluate(parser: Parser) -> None:
    """Add a command for each evaluator.

    Args:
        parser: Parser of ``evaluate``.
    """
    parser.set_defaults(parser=parser, command=lambda options: parser.print_help())
    commands = parser.add_subparsers(title="evaluations", metavar="EVALUATION", parser_class=Parser)
    options = {item.name: item for item in fields(Config)}
    types = get_type_hints(Config)
    for kind, entry in EVALUATORS.entries.items():
        evaluation = commands.add_parser(kind, help=entry.help, description=entry.help)
        evaluation.add_argument("--run", metavar="DIR", help="run folder, which sets the defaults of the options")
        evaluation.add_argument(
            "--best", action="store_true", help="use the best model, best.pt, instead of the last one"
        )
        evaluation.add_argument(
            "--weights",
            metavar="FILE",
            help="state dict of a backbone (torchvision, timm, MoCo or lightly), or 'imagenet'",
        )
        evaluation.add_argument(
            "--backbone", metavar="NAME", help="architecture of the backbone (required with --weights)"
        )
        evaluation.add_argument(
            "--only", choices=("trained",), help="evaluate the trained encoder only, without raw pixels and untrained"
        )
        for name in [*OPTIONS, *entry.options, "device", "workers"]:
            default, note = NOTES.get(name, (options[name].default, "with --run, that of the run"))
            add_option(evaluation, options[name], types[name], default, note)
        evaluation.set_defaults(parser=evaluation, command=_evaluate, kind=kind)


def _evaluate(options: argparse.Namespace) -> None:
    overrides = overrides_of(options, Config)
    overrides = {name: value for name, value in overrides.items() if name not in ("weights", "backbone")}
    if bool(options.run) == bool(options.weights):
        raise UserError(f"expected one of --run DIR and --weights FILE, got {'both' if options.run else 'neither'}")
    required = {"--backbone NAME": options.backbone, "--data SPEC": overrides.get("data")}
    if options.weights and (absent := [option for option, value in required.items() if not value]):
        raise UserError(f"--weights: expected {' and '.join(absent)} too, got none")
    if options.run and (options.backbone or overrides.pop("partial_weights", False)):
        option = "--backbone" if options.backbone else "--partial-weights"
        raise UserError(f"{option} is valid with --weights only: the backbone of a run is in its configuration")
    from selfsup_xbn.commands.evaluate import evaluate_run, evaluate_weights

    compare = options.only is None
    if options.run:
        lines = evaluate_run(options.kind, Path(options.run), overrides, best=options.best, compare=compare)
    else:
        lines = evaluate_weights(options.kind, options.weights, options.backbone, overrides, compare=compare)
    show(lines)
