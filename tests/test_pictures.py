"""The committed pictures of the experiments: titles, labels with units, and legends that hide no line."""

import importlib
import json

import pytest
from matplotlib.figure import Figure

from experiments.benchmarks.__main__ import draw_scaling
from experiments.pictures import Chart, save_chart
from experiments.runs import RESULTS

DRAWN = {
    "beyond-cars196": "beyond",
    "beyond-glyphs": "beyond",
    "beyond-omniglot": "beyond",
    "cars196-search": "cars196",
    "cars196-small": "cars196",
    "drift_residual": "drift_residual",
    "fig1-small": "fig1_sweeps",
    "fig2-small": "fig2_moco",
    "fig2-paper": "fig2_moco",
    "fig2-variants": "fig2_moco",
    "fig3-small": "fig3_drift",
    "glyphs-pretrain": "glyphs",
    "glyphs-supervise": "glyphs",
    "momentum_ablation-small": "momentum_ablation",
    "omniglot": "omniglot",
    "scaling-cpu": "benchmarks",
}


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: figures.append(figure))
    return figures


def test_every_committed_picture_is_checked_here():
    assert set(DRAWN) == {path.stem for path in RESULTS.glob("*.png")}


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_understandable_by_itself(name, saved, tmp_path):
    if name == "scaling-cpu":
        draw_scaling(json.loads((RESULTS / "benchmarks-cpu.json").read_text()), tmp_path / "picture.png")
    else:
        results = json.loads((RESULTS / f"{name}.json").read_text())
        importlib.import_module(f"experiments.{DRAWN[name]}").show(results, tmp_path / f"{name}.json")
    (figure,) = saved
    drawn = [axes for axes in figure.axes if axes.lines]
    assert figure.get_suptitle() or all(axes.get_title() for axes in drawn)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in drawn)
    figure.draw_without_rendering()
    (legend,) = [*figure.legends, *filter(None, (axes.get_legend() for axes in drawn))]
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in drawn)
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    titles = f"{figure.get_suptitle()} {drawn[0].get_title()}"
    assert name == "scaling-cpu" or "seed" in titles


def test_a_method_has_one_color_and_error_bars_lie_apart(saved, tmp_path):
    curves = {"XBM": ([1.0, 2.0], [0.1, 0.1]), "XBN": ([1.0, 2.0], [0.1, 0.1]), "other": ([3.0, 4.0], [0.0, 0.0])}
    charts = [Chart("", "x", "y", [1, 2], names) for names in (curves, {"XBN": curves["XBN"]})]
    save_chart(tmp_path / "a.png", "title", charts)
    first, second = (axes.containers for axes in saved[0].axes)
    (xbm, xbn, other), (alone,) = ([bars.lines[0] for bars in containers] for containers in (first, second))
    assert xbn.get_color() == alone.get_color() != xbm.get_color()
    assert xbm.get_xdata()[0] != xbn.get_xdata()[0]
    assert list(other.get_xdata()) == [1, 2]
