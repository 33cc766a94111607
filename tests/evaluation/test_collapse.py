"""A collapsed embedding is logged and warned of; a healthy one is not."""

import re

import numpy as np
import pytest
import torch

from selfsup_xbn.cli import main
from selfsup_xbn.evaluation.collapse import collapse_warning, embedding_std
from selfsup_xbn.evaluation.drift import FeatureDrift
from selfsup_xbn.runs.folder import read_metrics
from tests.command_line import SMALL, each_step


def collapse(optimizer):
    """Make the last layer, a linear head, a constant."""
    *_, weight, bias = optimizer.param_groups[-1]["params"]
    weight.data.mul_(1e-6)
    bias.data.fill_(1.0)


def test_collapse_is_logged_and_warned_of_once_an_epoch(tmp_path, capsys):
    with each_step(collapse):
        assert main([*SMALL, "--epochs", "2", "--head", "linear", "--out", str(tmp_path)]) == 0
    pattern = r"warning: epoch [12]: the embedding has collapsed: its standard deviation over a batch is \d"
    assert len(re.findall(pattern, capsys.readouterr().err)) == 2
    deviations = [record["embedding_std"] for record in read_metrics(tmp_path)[1:]]
    assert len(deviations) == 2
    assert all(value < 1e-4 for value in deviations)


def test_healthy_embedding_is_not_warned_of(tmp_path, capsys):
    assert main([*SMALL, "--epochs", "2", "--out", str(tmp_path)]) == 0
    assert "collapsed" not in capsys.readouterr().err
    assert 0.01 < read_metrics(tmp_path)[-1]["embedding_std"] < 128**-0.5


def test_deviation_is_that_of_unit_rows():
    images = torch.randn(1000, 64, 1, 1)
    drift = FeatureDrift(lambda x: 7 * x.flatten(1), images)
    deviation = embedding_std(drift.embeddings()).item()
    unit = images.flatten(1).numpy() / np.linalg.norm(images.flatten(1).numpy(), axis=1, keepdims=True)
    assert deviation == pytest.approx(unit.std(0, ddof=1).mean(), rel=1e-5)
    assert deviation == pytest.approx(1 / 8, rel=0.02)


def test_warning_starts_at_a_hundredth_of_a_spheres_deviation():
    assert collapse_warning(0.00126, 64) == ""
    assert "0.0012," in collapse_warning(0.0012, 64)
