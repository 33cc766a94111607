"""The picture of a run: its epochs are those of the log, and each panel says what it shows."""

import pytest

from selfsup_xbn.cli import main
from selfsup_xbn.config.modes import PretrainConfig, SuperviseConfig
from selfsup_xbn.evaluation.summary import panels
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


def test_baselines_of_equal_value_are_seen_beside_their_curve():
    before = {"epoch": 0, "knn_top1_untrained": 50.0, "knn_top1_backbone_untrained": 50.0, "knn_top1_raw_pixels": 50.0}
    records = [before, *({"epoch": epoch, "loss": 2.0, "knn_top1": 50.0} for epoch in (1, 2))]
    figure = curves_figure(PretrainConfig(epochs=2), records)
    figure.draw_without_rendering()
    curve, *baselines = figure.axes[1].lines
    assert curve.get_label() == "projection"
    assert len(baselines) == 3
    assert all(line.get_zorder() > curve.get_zorder() for line in baselines)
    painted = []
    for line in baselines:
        offset, (on, off) = (
            line.get_linestyle() if isinstance(line.get_linestyle(), tuple) else line._unscaled_dash_pattern
        )
        painted.append({(place - offset) % (on + off) for place in range(on)})
    assert set.intersection(*painted) == set()
    assert len(set.union(*painted)) == sum(map(len, painted))


def test_titles_leave_space_beside_them():
    names = [key for keys in panels().values() for key in keys]
    figure = curves_figure(SuperviseConfig(epochs=1), [dict.fromkeys(names, 1.0) | {"epoch": 1}])
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.title.get_window_extent().width < 0.9 * axes.get_window_extent().width
