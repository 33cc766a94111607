"""TensorBoard scalars are the records of metrics.jsonl, each step once, also after a resumed run."""

import pytest

from selfsup_xbn.cli import main
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.runs.tensorboard import EVENTS
from tests.command_line import SMALL, interrupted_at, refused


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


@pytest.mark.slow
def test_resumed_run_has_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    with interrupted_at(5):
        assert main([*SMALL, "--epochs", "3", "--tensorboard", "--out", str(tmp_path)]) == 75
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [2, 4]
    assert main(["pretrain", "--resume", "--out", str(tmp_path)]) == 0
    assert scalars(tmp_path) == expected(tmp_path)
    assert len(list(tmp_path.glob(EVENTS))) == 1
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [2, 4, 6]
    assert main([*SMALL, "--epochs", "1", "--overwrite", "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.glob(EVENTS))  # of the run that was replaced


def test_missing_package_is_named_with_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(capsys, [*SMALL, "--tensorboard", "--out", str(tmp_path / "run")])
    assert "selfsup-xbn[tensorboard]" in message
    assert not (tmp_path / "run").exists()
