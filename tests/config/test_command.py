"""The command of a run, parsed again, is the run's config."""

from dataclasses import fields, replace
from functools import cache

import pytest

from selfsup_xbn.cli import _parser, config_of
from selfsup_xbn.config.command import command_of
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.config.registry import METHODS

parser = cache(_parser)
ODD = 'it\'s $HOME/a b; "c" -- \\d é'
SPECIAL = {"save_every": "9m", "recall_ks": "1,7", "queue_size": "7", "validation": "10%"}
SPECIAL |= {"mean": "0.5", "std": "0.1,0.2,0.3", "split_classes": "40%"}
SPECIAL |= {"loss_args": "margin=-0.5", "miner_args": "a=1"}


def parsed(command):
    program, *words = command
    assert program == "selfsup-xbn"
    return config_of(parser().parse(words), METHODS[words[0]])


def changed(config, item):
    """Another value that the option takes."""
    value = getattr(config, item.name)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return {"batch_size": 120, "images_per_class": 8, "momentum": 0.123}.get(item.name, value + 1)
    others = [choice for choice in item.metadata["choices"] if choice != value]
    return others[0] if others else SPECIAL.get(item.name, ODD)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_repeated_without_naming_it(name):
    assert "--recipe" not in command_of(RECIPES[name])
    assert parsed(command_of(RECIPES[name])) == RECIPES[name]


@pytest.mark.parametrize("mode", METHODS)
def test_every_option_is_repeated(mode):
    base = next(recipe for recipe in RECIPES.values() if recipe.mode == mode)
    for item in fields(base):
        config = replace(base, **{item.name: changed(base, item)})
        assert config != base
        assert parsed(command_of(config)) == config, item.name


@pytest.mark.parametrize("text", ["-x", "--resume", "", "-1", "=", "a=b"])
def test_values_that_look_like_options_stay_values(text):
    config = replace(RECIPES["digits"], out=text, weights=text, data=text)
    assert parsed(command_of(config)) == config


def test_what_is_as_by_default_is_not_named():
    assert command_of(RECIPES["glyphs-moco"]) == ["selfsup-xbn", "pretrain"]
    changed = replace(RECIPES["glyphs-moco"], compile=True, lr=0.5)
    assert command_of(changed)[2:] == ["--lr", "0.5", "--compile"]
