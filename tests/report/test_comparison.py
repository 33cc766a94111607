"""The picture of a comparison: a legend that is not cut off, one color for each method, one notation of units."""

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from experiments.pictures import Chart, save_chart
from selfsup_xbn.evaluation.summary import BASELINES, panels
from selfsup_xbn.report.colors import COLORS
from selfsup_xbn.report.comparison import comparison_lines, draw_comparison


def cell(label, last=50.0, **config):
    history = {"0": {"recall@1": {"1": 40.0, "2": last}}}
    config = {"mode": "supervise", "data": "digits", "batch_size": 16, "queue_size": "50%"} | config
    mean = {"recall@1": last, "recall@1_untrained": 20.0}
    return {"label": label, "config": config, "seeds": {"0": {}}, "mean": mean, "std": {}, "history": history}


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved, drawn in full."""
    figures = []

    def save(figure, file, **options):
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


@pytest.mark.parametrize(
    ("label", "ncols"), [("m=0.{}", 3), ("momentum=0.99{}, adaptation=xbn", 2), ("momentum=0.99{}, " + "m" * 30, 1)]
)
def test_legend_columns_fit_the_labels(label, ncols, saved, tmp_path):
    cells = [cell(label.format(number), adaptation="xbn") for number in range(12)]
    draw_comparison(cells, "recall@1", tmp_path / "a.png")
    (legend,) = saved[0].legends
    box, axes = legend.get_window_extent(), saved[0].axes[0].get_window_extent()
    assert legend._ncols == ncols
    assert saved[0].bbox.x0 <= box.x0
    assert box.x1 <= saved[0].bbox.x1
    assert box.y1 < axes.y0
    assert axes.height > 250


def test_a_label_of_any_length_is_within_the_picture(tmp_path, pictures):
    draw_comparison([cell("m" * 150, adaptation="xbn")], "recall@1", tmp_path / "a.png")
    pixels = imread(tmp_path / "a.png")[..., :3]
    assert pixels.shape[1] > 1000
    assert all((edge == 1).all() for edge in (pixels[:, 0], pixels[:, -1], pixels[0], pixels[-1]))


def test_methods_have_the_colors_of_the_experiments(saved, tmp_path):
    methods = {
        "no memory": {"adaptation": "xbn", "queue_size": "0"},
        "XBM": {"adaptation": "xbm"},
        "XBM*": {"adaptation": "xbm", "batch_loss_weight": 1.0},
        "XBN": {"adaptation": "xbn"},
        "AXBN": {"adaptation": "axbn"},
    }
    assert list(methods) == list(COLORS)
    cells = [cell(f"{name}, lr {lr}", lr=lr, **config) for lr in range(5) for name, config in methods.items()]
    draw_comparison([*cells, cell("mine", adaptation="mine")], "recall@1", tmp_path / "a.png")
    save_chart(tmp_path / "b.png", "", [Chart("", "x", "y", [1], {name: ([1.0], [0.0]) for name in methods})])
    lines = {line.get_label(): line for line in saved[0].axes[0].lines}
    bars = {container.get_label(): container.lines[0].get_color() for container in saved[1].axes[0].containers}
    for name in methods:
        assert {lines[f"{name}, lr {lr}"].get_color() for lr in range(5)} == {COLORS[name]} == {bars[name]}
    assert lines["mine"].get_color() not in COLORS.values()
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines.values()}
    assert len(styles) == len(lines) == 26


def test_units_are_in_brackets(saved, tmp_path):
    draw_comparison([cell("a", adaptation="xbn")], "recall@1", tmp_path / "a.png")
    titles = [saved[0].axes[0].get_ylabel(), *panels()]
    assert "Recall@1 [%]" in titles
    assert not any("(%)" in title or "(s)" in title for title in titles)


def test_the_encoder_at_epoch_0_is_named_as_its_metrics_are(saved, tmp_path):
    cells = [cell("a", adaptation="xbn")]
    draw_comparison(cells, "recall@1", tmp_path / "a.png")
    labels = [label for curves in panels().values() for key, label in curves.items() if key.endswith("_untrained")]
    texts = [saved[0].axes[0].get_xlabel(), comparison_lines(cells, "recall@1")[0], *labels, *list(BASELINES)[1:2]]
    assert len(texts) == 7
    assert [text for text in texts if "untrained" not in text or "initial" in text] == []
