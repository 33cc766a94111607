"""Config: what is refused, what comes back from config.json, and the recipes."""

import json
from dataclasses import fields, replace

import pytest

from selfsup_xbn.config.modes import PretrainConfig, SuperviseConfig
from selfsup_xbn.config.parsing import parse_save_interval
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.config.saved import differences, from_resolved
from selfsup_xbn.config.schema import resolved
from selfsup_xbn.errors import UserError, near


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptation": "xbnn"}, r"--adaptation: expected one of xbm, xbn, axbn, got 'xbnn'; did you mean xbn"),
        ({"epochs": 0}, "--epochs: expected a number of at least 1, got 0"),
        ({"epochs": 2.5}, r"--epochs: expected int, got 2\.5"),
        ({"lr": float("nan")}, "--lr: expected a number of at least 0, got nan"),
        ({"temperature": 0.0}, "--temperature"),
        ({"batch_size": True}, "--batch-size: expected int, got True"),
        ({"data": 3}, "--data: expected str, got 3"),
    ],
)
def test_wrong_values_are_named_with_what_is_expected(change, message, unchecked):
    with pytest.raises(UserError, match=message):
        PretrainConfig(**change)


def test_every_recipe_comes_back_from_json():
    for recipe in RECIPES.values():
        assert from_resolved(json.loads(json.dumps(resolved(recipe)))) == recipe


def test_whole_numbers_are_taken_for_floats(unchecked):
    assert PretrainConfig(lr=1).lr == 1.0


@pytest.mark.parametrize("values", [{}, {"mode": "nonsense"}, [], None, {"mode": "pretrain"}, {"mode": ["pretrain"]}])
def test_damaged_config_is_refused(values):
    with pytest.raises(UserError, match="expected"):
        from_resolved(values)


@pytest.mark.parametrize("config", [PretrainConfig(seed=3), RECIPES["sop"]], ids=["pretrain", "supervise"])
def test_missing_option_is_an_error_only_if_it_changes_results(config):
    saved = resolved(config)
    for item in fields(config):
        rest = {name: value for name, value in saved.items() if name != item.name}
        if item.metadata["affects_results"] and not item.metadata["added_later"]:
            with pytest.raises(UserError, match=f"'{item.name}'"):
                from_resolved(rest)
        else:
            assert from_resolved(rest) == replace(config, **{item.name: item.default})


def test_differences_name_what_changes_results_only():
    a = PretrainConfig()
    assert differences(a, replace(a, device="cuda", out="elsewhere", workers=7)) == []
    assert differences(a, replace(a, seed=3)) == ["--seed: the run has 0, the command has 3"]


def test_figure_2_recipe_is_the_papers():
    config = RECIPES["cifar10-fig2"]
    expected = {
        "batch_size": 128,
        "queue_size": "4096",
        "momentum": 0.99,
        "temperature": 0.1,
        "lr": 0.03,
        "epochs": 200,
    }
    expected |= {
        "epochs": 200,
        "weight_decay": 5e-4,
        "bn_splits": 8,
        "knn_k": 200,
        "knn_temperature": 0.1,
        "head": "linear",
        "dim": 128,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    changed = replace(RECIPES["cifar10-fig2"], data="cifar100")
    assert changed == RECIPES["cifar100-fig2"]


def test_every_option_has_a_help_text():
    for config in (PretrainConfig, SuperviseConfig):
        assert all(len(item.metadata["help"]) > 5 for item in fields(config))


def test_nearest_word_is_offered():
    assert near("--bach-size", ["--batch-size", "--seed"]) == "; did you mean --batch-size?"
    assert near("--zzz", ["--batch-size", "--seed"]) == ""
    assert near("net3", ["net1", "net2", "tea"], count=2) == "; did you mean net2 or net1?"


def test_save_every_is_epochs_or_minutes():
    assert parse_save_interval("3") == (3, 0.0)
    assert parse_save_interval("10m") == (0, 600.0)
    assert parse_save_interval("0.5m") == (0, 30.0)


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "m", "0m", "-2m", "nanm", "infm", "1e999m", "10 minutes", "", "1h", "9" * 5000]
)
def test_save_every_refuses_anything_else(text):
    with pytest.raises(
        UserError, match=r"^--save-every: expected a positive number of epochs, or of minutes as in 10m, got '"
    ):
        parse_save_interval(text)
