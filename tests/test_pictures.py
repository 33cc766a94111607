"""The committed pictures of the experiments: titles, labels with units, and legends that hide no line."""

import importlib
import json

import pytest
from matplotlib.figure import Figure

from experiments.benchmarks.__main__ import draw_scaling
from experiments.pictures import Chart, courses, save_chart
from experiments.runs import RESULTS
from selfsup_xbn.report.colors import COLORS

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
    for axes in drawn:
        area, title, label = (part.get_window_extent() for part in (axes, axes.title, axes.yaxis.label))
        assert title.width < 0.95 * area.width
        assert label.height < 0.95 * area.height
    assert not any("(%)" in text for axes in drawn for text in (axes.get_title(), axes.get_ylabel()))
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


def test_variants_of_a_method_have_its_color_and_other_dashes(saved, tmp_path):
    curves = {name: ([1.0, 2.0], [0.0, 0.0]) for name in ("XBN", "XBN, more steps", "XBM, more steps", "other")}
    save_chart(tmp_path / "a.png", "title", [Chart("", "x", "y", [1, 2], curves)])
    xbn, more, xbm, other = (bars.lines[0] for bars in saved[0].axes[0].containers)
    assert [line.get_color() for line in (xbn, more, xbm)] == [COLORS[name] for name in ("XBN", "XBN", "XBM")]
    assert other.get_color() not in COLORS.values()
    assert (xbn.get_linestyle(), xbn.get_marker()) == (xbm.get_linestyle(), xbm.get_marker())
    assert xbn.get_linestyle() != more.get_linestyle()
    assert xbn.get_marker() != more.get_marker()


def test_curves_of_a_chart_have_the_epochs_that_all_have():
    by_seed = {"XBM": [[1, 2, 3, 4], [2, 3, 4]], "XBN": [[2, 3]], "none": [[]]}
    cells = {
        name: {
            "history": {
                str(seed): {"loss": {str(e): float(e + seed) for e in epochs}} for seed, epochs in enumerate(seeds)
            }
        }
        for name, seeds in by_seed.items()
    }
    epochs, curves = courses(cells, "loss")
    assert epochs == [2, 3]
    assert curves == {"XBM": ([2.5, 3.5], [0.5**0.5] * 2), "XBN": ([2, 3], [0.0, 0.0])}


def test_epochs_of_the_committed_curves_are_equal(saved, tmp_path):
    importlib.import_module("experiments.fig2_moco").show(
        json.loads((RESULTS / "fig2-paper.json").read_text()), tmp_path / "fig2-paper.json"
    )
    for axes in saved[0].axes:
        ends = {round(container.lines[0].get_xdata()[-1]) for container in axes.containers}
        assert len(axes.containers) == 2
        assert len(ends) == 1
