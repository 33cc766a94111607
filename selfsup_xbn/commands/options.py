"""Configuration that the parsed options of a command stand for."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from selfsup_xbn.config.recipes import RECIPES, recipe_for
from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import UserError, near
from selfsup_xbn.utils.launch import launched_rank


def config_of(options: argparse.Namespace, kind: type[Config]) -> Config:
    """Return the configuration that parsed options stand for.

    The options override the recipe, by default the one for the data set. With ``--resume`` and no ``--recipe`` they
    override the configuration of the saved run. Only the first process of a distributed run reads the saved run;
    ``train`` sends its configuration to the others.

    Args:
        options: Parsed options.
        kind: Configuration class of the mode.

    Raises:
        UserError: The recipe is unknown, or an option is invalid.
    """
    overrides = overrides_of(options, kind)
    name, recipe = recipe_of(options, kind)
    if options.recipe and options.recipe != name:
        names = [name for name, other in RECIPES.items() if type(other) is kind]
        other = RECIPES.get(options.recipe)
        hint = f", a recipe of {other.mode}" if other else near(options.recipe, names)
        raise UserError(f"--recipe: expected one of {', '.join(names)}, got {options.recipe!r}{hint}")
    config = replace(recipe, **overrides)
    if options.resume and not options.recipe and launched_rank() == 0:
        from selfsup_xbn.runs.folder import has_run, read_config

        folder = Path(config.run_folder)
        if has_run(folder) and type(saved := read_config(folder)) is kind:
            return replace(saved, **overrides)
    return config


def recipe_of(options: argparse.Namespace, kind: type[Config]) -> tuple[str | None, Config]:
    """Return the recipe that the options name or, without a valid name, the one for the data set, with its name."""
    name = options.recipe
    if name not in RECIPES or type(RECIPES[name]) is not kind:
        name = recipe_for(kind.mode, getattr(options, "data", None) or "")
    return name, RECIPES[name] if name else kind()


def overrides_of(options: argparse.Namespace, kind: type[Config]) -> dict[str, Any]:
    """Return the fields of a configuration class that the parsed options set."""
    return {item.name: getattr(options, item.name) for item in fields(kind) if hasattr(options, item.name)}
