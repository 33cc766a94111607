"""Reconstruction of the command that started a run."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from selfsup_xbn.config.recipes import RECIPES, default_recipe, recipe_for
from selfsup_xbn.config.schema import Config


def command_of(config: Config) -> list[str]:
    """Return the words of the command that starts a run with a configuration.

    The command has the options that differ from the recipe that is used for the data set if no recipe is given, and
    the data set unless it is the default one.
    """
    default = default_recipe(config.mode)
    name = recipe_for(config.mode, config.data)
    recipe = RECIPES[name] if name else default
    words = ["selfsup-xbn", config.mode]
    for item in fields(config):
        value = getattr(config, item.name)
        if value != getattr(default if item.name == "data" else recipe, item.name):
            words += _option("--" + item.name.replace("_", "-"), value)
    return words


def _option(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    text = str(value)
    # argparse would take a leading dash for an option
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]
