"""The recipe that a data set takes, and the defaults that --help shows."""

from dataclasses import replace

import pytest

from selfsup_xbn.cli import _parser, config_of, main
from selfsup_xbn.config.command import command_of
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.config.registry import METHODS


def config(*words):
    return config_of(_parser().parse(words), METHODS[words[0]])


@pytest.mark.parametrize(
    ("words", "recipe", "changes"),
    [
        (["supervise", "--data", "inshop:/x"], "inshop", {"data": "inshop:/x"}),
        (["supervise", "--data", "sop"], "sop", {}),
        (["supervise", "--data", "folder:/x", "--dim", "7"], "photos", {"data": "folder:/x", "dim": 7}),
        (["pretrain", "--data", "list:x.csv"], "photos-pretrain", {"data": "list:x.csv"}),
        (["pretrain", "--data", "cifar10:/x"], "cifar10-fig2", {"data": "cifar10:/x"}),
        (["pretrain", "--data", "sop:/x"], "photos-pretrain", {"data": "sop:/x"}),
        (["supervise", "--data", "sop:/x", "--recipe", "photos"], "photos", {"data": "sop:/x"}),
    ],
    ids=str,
)
def test_data_set_takes_its_recipe_unless_one_is_named(words, recipe, changes):
    assert config(*words) == replace(RECIPES[recipe], **changes)
    assert config(*command_of(config(*words))[1:]) == config(*words)


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        (["supervise", "--data", "sop:/x"], "sop"),
        (["supervise", "--recipe", "photos"], "photos"),
        (["pretrain", "--data=folder:x"], "photos-pretrain"),
    ],
    ids=str,
)
def test_help_shows_the_defaults_that_hold(words, recipe, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # argparse breaks lines at hyphens
    assert f"Defaults: recipe {recipe}." in text
    chosen = RECIPES[recipe]
    for name, value in (("backbone", chosen.backbone), ("lr", chosen.lr), ("batch_size", chosen.batch_size)):
        option = text.split(f" --{name.replace('_', '-')} ")[-1]
        assert option.split("(default: ")[1].startswith(f"{value!r})")
    assert f"if it has initial weights (default: {'yes' if chosen.freeze_bn else 'no'})" in text


def test_recipes_for_photographs_accept_small_folders():
    for name in ("photos", "photos-pretrain"):
        assert RECIPES[name].queue_size == "50%"
        assert RECIPES[name].batch_size <= 64
