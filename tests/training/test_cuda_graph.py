"""What the trainer does around a step that is replayed as a CUDA graph. The graph itself: ``tests/test_cuda.py``."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.training.cuda_graph import CaptureError, GraphedStep
from selfsup_xbn.training.optimization import load_optimizer_state, make_optimizer
from selfsup_xbn.training.run import Run

SMALL = {"device": "cpu", "limit_train": 128, "limit_test": 64, "batch_size": 32, "epochs": 2, "drift_every": 0}


def run_of(**changes):
    return Run(replace(RECIPES["digits"], **SMALL, queue_size="64", **changes))


class Replayed:
    """A stand-in for ``GraphedStep``, which runs the step and records what a graph would read."""

    def __init__(self, run):
        self.run, self.replays, self.weights = run, 0, []

    def __call__(self, views, labels):
        self.weights.append(self.run.method.ema_weight.item())
        self.replays += 1
        return self.run._step(views, labels)


def test_scheduled_momentum_is_set_before_each_replay(unchecked):
    run = run_of(momentum=0.9, momentum_schedule="cosine")
    run.graphed = graphed = Replayed(run)
    for epoch in range(2):
        for batch in run.batches.epoch(epoch):
            run.train_step(batch)
        run.end_epoch()
    expected = [1 - run.method.momentum_at(step / 8) for step in range(8)]
    assert graphed.weights == pytest.approx(expected, rel=1e-6)
    assert expected[0] == pytest.approx(0.1)
    assert expected[-1] < 0.01


def test_queue_is_refreshed_once_a_pass_of_replays(unchecked, monkeypatch):
    run = run_of()
    run.graphed = Replayed(run)
    monkeypatch.setattr("selfsup_xbn.memory.feature_queue.can_refresh", lambda tensor: False)
    refreshed, refresh = [], run.method.queue.refresh
    monkeypatch.setattr(run.method.queue, "refresh", lambda: (refreshed.append(run.step), refresh()))
    for batch in run.batches.epoch(0):
        run.train_step(batch)
    assert refreshed == [1, 3]


def test_failed_capture_continues_with_eager_steps(unchecked):
    eager = run_of()  # which seeds the random numbers of the step
    eager.train_step(next(eager.batches.epoch(0)))
    run = run_of()

    def fails(views, labels):
        raise CaptureError("an operation that waits")

    run.graphed = fails
    with pytest.warns(UserWarning, match="continuing without: an operation that waits"):
        run.train_step(next(run.batches.epoch(0)))
    assert run.graphed is None
    for a, b in zip(run.method.state_dict().values(), eager.method.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_head_epochs_are_eager_and_later_epochs_get_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", object)
    run = Run(
        replace(RECIPES["digits-disjoint"], device="cpu", limit_train=120, head_epochs=1, epochs=1, drift_every=0)
    )
    run.device = torch.device("cuda")
    run.start_stage()
    assert run.graphed is None
    run.epoch = 1
    run.start_stage()
    assert isinstance(run.graphed, GraphedStep)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizer_keeps_its_options_when_it_is_restored(name):
    config = replace(RECIPES["digits"], optimizer=name, lr=0.25)
    other, own = nn.Linear(3, 2), nn.Linear(3, 2)
    saved, optimizer = make_optimizer(config, other), make_optimizer(config, own)
    for _ in range(3):
        other(torch.ones(4, 3)).sum().backward()
        saved.step()
    state = saved.state_dict()
    state["param_groups"][0] |= {"lr": torch.tensor(0.5), "fused": True, "capturable": True}  # as saved on a GPU
    load_optimizer_state(optimizer, state)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["fused"], group.get("capturable", False)) == (0.25, None, False)
    assert group["params"] == list(own.parameters())
    for a, b in zip(own.parameters(), other.parameters(), strict=True):
        assert optimizer.state[a].keys() == saved.state[b].keys() != set()
        assert all(torch.equal(value, saved.state[b][key]) for key, value in optimizer.state[a].items())


def test_optimizer_state_of_another_network_is_refused():
    config = RECIPES["digits"]
    saved, optimizer = make_optimizer(config, nn.Linear(3, 2)), make_optimizer(config, nn.Linear(3, 2, bias=False))
    with pytest.raises(ValueError, match="size of optimizer's group"):
        load_optimizer_state(optimizer, saved.state_dict())
