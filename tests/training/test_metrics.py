"""Means of an epoch, and the clock that runs while a run trains."""

from types import SimpleNamespace

import pytest
import torch

from selfsup_xbn.cli import main
from selfsup_xbn.evaluation.evaluators import KnnEvaluator
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.training import metrics
from selfsup_xbn.training.metrics import MetricAccumulator
from selfsup_xbn.training.trainer import Run
from tests.command_line import PRETRAIN


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    hands = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: hands.now))
    return hands


def test_images_per_second_leave_evaluations_out(tmp_path, clock, monkeypatch):
    step, encoder = Run.train_step, KnnEvaluator.encoder

    def slow_step(run, batch):
        step(run, batch)
        clock.now += 2

    def slow_evaluation(evaluator, network):
        clock.now += 1000
        return encoder(evaluator, network)

    monkeypatch.setattr(Run, "train_step", slow_step)
    monkeypatch.setattr(KnnEvaluator, "encoder", slow_evaluation)
    options = ["--limit-train", "128", "--batch-size", "32", "--queue-size", "64", "--epochs", "3"]
    assert main([*PRETRAIN, *options, "--out", str(tmp_path)]) == 0
    assert [record["images_per_second"] for record in read_metrics(tmp_path)[1:]] == [16, 16, 16]


def test_means_maxima_and_seconds_go_on_after_a_checkpoint(clock):
    first = MetricAccumulator(torch.device("cpu"))
    first.start()
    first.add("loss", torch.tensor(1.0))
    first.add_maximum("drift_max", torch.tensor(5.0))
    clock.now = 4.0
    second = MetricAccumulator(torch.device("cpu"))
    second.load_state_dict(first.state_dict())
    clock.now = 100.0  # another process, later
    second.start()
    second.add("loss", torch.tensor(4.0))
    second.add_maximum("drift_max", torch.tensor(3.0))
    clock.now = 101.0
    assert second.record(batch_size=10) == {"loss": 2.5, "drift_max": 5.0, "images_per_second": 4.0}
