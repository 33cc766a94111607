"""Cells of a comparison, from the options of its command."""

from __future__ import annotations

import pytest

from selfsup_xbn.config.cells import cells_of
from selfsup_xbn.config.modes import PretrainConfig, SuperviseConfig
from selfsup_xbn.errors import UserError

BASE = SuperviseConfig()


def values_of(cells, *names):
    return [tuple(getattr(config, name) for name in names) for config in cells.values()]


def test_each_option_varied_adds_its_values_in_order():
    cells = cells_of(BASE, [("--vary", ["adaptation=xbm,xbn"]), ("--vary", ["queue-size=0"])])
    assert list(cells) == ["adaptation=xbm", "adaptation=xbn", "queue-size=0"]
    assert values_of(cells, "adaptation", "queue_size") == [("xbm", "100%"), ("xbn", "100%"), ("xbn", "0")]


def test_options_varied_together_are_combined():
    cells = cells_of(BASE, [("--vary", ["adaptation=xbm,xbn", "lr=0.1,0.2", "tensorboard=true"])])
    expected = [("xbm", 0.1), ("xbm", 0.2), ("xbn", 0.1), ("xbn", 0.2)]
    assert values_of(cells, "adaptation", "lr") == expected
    assert all(config.tensorboard for config in cells.values())


def test_a_named_cell_takes_values_with_commas():
    (config,) = cells_of(BASE, [("--cell", ["mine", "recall_ks=1,5", "loss-args=a=1,b=2", "--dim=7"])]).values()
    assert (config.recall_ks, config.loss_args, config.dim) == ("1,5", "a=1,b=2", 7)


@pytest.mark.parametrize(("base", "labels"), [(BASE, ["no memory", "XBM", "XBN"]), (PretrainConfig(), ["XBM", "XBN"])])
def test_memories_are_compared_by_default(base, labels):
    assert list(cells_of(base, [])) == labels


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([("--vary", ["adaptaton=xbm"])], ["--adaptaton", "did you mean adaptation"]),
        ([("--vary", ["adaptation=xbm,xbq"])], ["--adaptation", "xbq"]),
        ([("--vary", ["batch-size=many"])], ["--batch-size", "int", "many"]),
        ([("--vary", ["batch-size=7"])], ["--batch-size 7", "multiple"]),
        ([("--vary", ["compile=perhaps"])], ["--compile", "true or false"]),
        ([("--vary", ["lr"])], ["NAME=VALUE", "lr"]),
        ([("--vary", ["seed=1,2"])], ["--seed", "--seeds"]),
        ([("--vary", ["out=a"])], ["--out"]),
        ([("--vary", ["lr=1,1"])], ["two cells", "lr=1"]),
        ([("--vary", ["lr=1"]), ("--cell", ["a", "lr=1.0"])], ["'lr=1'", "'a'", "same"]),
        ([("--vary", ["device=cpu,cuda"])], ["same"]),
        ([("--cell", ["lr=1"])], ["label", "lr=1"]),
        ([("--cell", ["a", "lr"])], ["--cell a", "NAME=VALUE"]),
    ],
)
def test_cells_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UserError) as refusal:
        cells_of(BASE, options)
    assert all(word in str(refusal.value) for word in words), refusal.value
