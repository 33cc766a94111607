"""TensorBoard scalars are the records of metrics.jsonl, each step once, also when a run was stopped and resumed."""

import os
import signal

import pytest
from test_cli import refused

from selfsup_xbn.cli import main
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.runs.tensorboard import EVENTS
from selfsup_xbn.training.trainer import Run

SMALL = ["pretrain", "--limit-train", "128", "--batch-size", "64", "--queue-size", "64", "--epochs", "3"]


def scalars(folder):
    """{name: [(step, value), ...]} as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def expected(folder):
    found: dict[str, list] = {}
    for record in read_metrics(folder):
        for name, value in record.items():
            if name != "step" and value is not None:
                found.setdefault(name.replace("@", "_"), []).append((record.get("step", 0), pytest.approx(value)))
    return found


def test_a_resumed_run_has_each_step_once(tmp_path, monkeypatch):
    steps, step = [], Run.train_step

    def stop_after_the_second_epoch(run, batch):
        step(run, batch)
        steps.append(run.step)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "train_step", stop_after_the_second_epoch)
    pytest.importorskip("tensorboard")
    assert main([*SMALL, "--tensorboard", "--out", str(tmp_path)]) == 75
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [2, 4]
    assert main(["pretrain", "--resume", "--out", str(tmp_path)]) == 0
    assert scalars(tmp_path) == expected(tmp_path)
    assert len(list(tmp_path.glob(EVENTS))) == 1
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [2, 4, 6]
    assert main([*SMALL, "--epochs", "1", "--overwrite", "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.glob(EVENTS))  # of the run that was replaced


def test_without_the_package_nothing_is_written_and_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(capsys, [*SMALL, "--tensorboard", "--out", str(tmp_path / "run")])
    assert "selfsup-xbn[tensorboard]" in message
    assert not (tmp_path / "run").exists()
