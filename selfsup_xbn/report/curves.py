"""Plots and tables of the records in ``metrics.jsonl``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import printable
from selfsup_xbn.evaluation.summary import columns, comparison_table, latest, panels
from selfsup_xbn.runs.checkpoint import BEST
from selfsup_xbn.runs.folder import read_config, read_metrics
from selfsup_xbn.utils.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]
Points = list[tuple[float, float]]


def draw_curves(folder: Path) -> Path:
    """Plot the logged metrics against the epoch to ``curves.png`` in the run folder, and return its path.

    Raises:
        UserError: The folder has no run, its metrics are damaged, or the file could not be written.
    """
    figure, path = curves_figure(read_config(folder), read_metrics(folder)), folder / "curves.png"
    with replacing(path) as file:
        figure.savefig(file, dpi=110)
    return path


def curves_figure(config: Config, records: Records) -> Figure:
    """Return the figure of a run, with a panel for each group of metrics.

    All panels have the same epochs, those of the log: the head epochs, on gray, come first.

    Args:
        config: Configuration of the run.
        records: Records of the run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = {key for record in records for key in record}
    shown = [(title, keys) for title, keys in panels().items() if logged & keys.keys()]
    figure = Figure(figsize=(4.5 * len(shown), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    title = f"{config.mode} on {config.data}, {config.adaptation}, seed {config.seed}"
    figure.suptitle(printable(title), parse_math=False)
    for axes, (title, keys) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for color, (key, label) in enumerate(keys.items()):
            _curve(axes, points_of(records, key), label, color)
        if config.head_epochs:
            axes.axvspan(0.5, config.head_epochs + 0.5, color="0.93", zorder=0)
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="epoch (gray: head only)" if config.head_epochs else "epoch")
        axes.set_xlim(0.5, max(record["epoch"] for record in records) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if len(axes.get_lines()) > 1:
            axes.legend(
                fontsize="small",
                loc="upper center",
                bbox_to_anchor=(0.5, -0.15),
                ncols=2,
                frameon=False,
                handlelength=3,
            )
    return figure


def points_of(records: Records, key: str) -> Points:
    """Return (epoch, value) of each record that has a finite number with the name ``key``."""
    numbers = [(record["epoch"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    return [(float(epoch), float(value)) for epoch, value in numbers if math.isfinite(value)]


def mean_points(runs: Sequence[Records], key: str) -> tuple[Points, list[float]]:
    """Return (epoch, mean value) over the runs that have a value, and the standard deviation at each of these epochs.

    Only epochs at which all of these runs have a value count. The deviation of one run is 0.

    Example:
        >>> mean_points([[{"epoch": 1, "loss": 2.0}], [{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": 1.0}]], "loss")
        ([(1.0, 2.25)], [0.3535533905932738])
    """
    values = [dict(points) for records in runs if (points := points_of(records, key))]
    epochs = sorted(set.intersection(*(set(run) for run in values))) if values else []
    at = [[run[epoch] for run in values] for epoch in epochs]
    points = [(epoch, statistics.mean(numbers)) for epoch, numbers in zip(epochs, at, strict=True)]
    return points, [statistics.stdev(numbers) if len(numbers) > 1 else 0.0 for numbers in at]


def is_baseline(points: Points) -> bool:
    """Return whether the only value is of epoch 0, before the training."""
    return len(points) == 1 and points[0][0] == 0


def _curve(axes: Any, points: Points, label: str, number: int) -> None:
    """Draw a curve, or a baseline as a dashed line over the whole width.

    Baselines lie above the curves. The dashes of equal baselines lie in each other's gaps.
    """
    style: dict[str, Any] = {"label": label, "color": f"C{number}"}
    if is_baseline(points):
        axes.axhline(points[0][1], **style, linestyle=(3 * number, (3, 6)), zorder=3)
    elif points:
        axes.plot(*zip(*points, strict=True), **style, marker="." if len(points) < 40 else None)


def result_lines(folder: Path) -> list[str]:
    """Return the lines with the results of a completed run and the names of its files.

    Raises:
        UserError: The metrics are damaged.
    """
    files, records = sorted(path.name for path in folder.iterdir() if path.is_file()), read_metrics(folder)
    table = [*comparison_table(latest(records)), *(_best_lines(records) if BEST in files else [])]
    return [*(["", *table] if table else []), "", f"run folder: {folder}  ({', '.join(files)})"]


def _best_lines(records: Records) -> list[str]:
    """Return a line on the epoch of the best model: the first one with the largest value of the main metric."""
    for name in ("recall@1", "knn_top1"):
        trained = [record for record in records if record["epoch"] > 0]
        test, validation = (dict(points_of(trained, key)) for key in (name, f"{name}_validation"))
        if values := validation or test:
            epoch = max(values, key=lambda epoch: values[epoch])
            line = f"{BEST} is of epoch {epoch:.0f}, with the best {columns()[name]} of the "
            others = f", {test[epoch]:.2f} % of the test images" if validation and epoch in test else ""
            return [line + f"{'validation' if validation else 'test'} images: {values[epoch]:.2f} %{others}"]
    return []
