"""The picture of a run: its epochs are those of the log, and each panel says what it shows."""

import pytest

from selfsup_xbn.cli import main
from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.report.curves import curves_figure
from selfsup_xbn.runs.folder import read_metrics
from tests.command_line import SUPERVISE, interrupted_at

HEAD = ["--limit-train", "128", "--head-epochs", "1", "--epochs", "2", "--eval-every", "1", "--drift-every", "1"]


def test_picture_log_and_progress_number_the_epochs_alike(tmp_path, capsys):
    with interrupted_at(3):  # of two steps per epoch
        assert main([*SUPERVISE, *HEAD, "--out", str(tmp_path)]) == 75
    assert "stopped at epoch 2, step 1;" in capsys.readouterr().err
    assert main(["supervise", "--resume", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    records = read_metrics(tmp_path)
    epochs = [record["epoch"] for record in records if "loss" in record]
    assert epochs == [2, 3]
    assert [f"epoch {epoch}/3   loss" in printed for epoch in (1, 2, 3)] == [False, True, True]
    figure = curves_figure(SuperviseConfig(head_epochs=1, epochs=2), records)
    loss, *others = figure.axes
    assert {line.get_label(): list(line.get_xdata()) for line in loss.lines} == {"loss": [2, 3], "head epochs": [1]}
    assert {axes.get_xlim() for axes in figure.axes} == {(0.5, 3.5)}
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch (gray: head only)"}
    (gray,) = loss.patches
    edges = loss.transData.transform([(0.5, 0), (1.5, 0)])[:, 0]
    assert gray.get_extents().intervalx == pytest.approx(edges)
    moments = others[-1]
    assert "best: 0" in moments.get_title()
    assert moments.get_ylim()[0] <= 0
    assert [line.get_label() for line in moments.lines] == ["before the adaptation", "after the adaptation"]


def test_a_run_without_head_epochs_has_none_in_its_picture():
    figure = curves_figure(SuperviseConfig(epochs=1), [{"epoch": 0}, {"epoch": 1, "loss": 2.0}])
    assert figure.axes[0].get_xlabel() == "epoch"
    assert list(figure.axes[0].patches) == []
