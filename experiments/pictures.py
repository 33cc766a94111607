"""Draw charts of results: mean and standard deviation over the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Means and standard deviations along the x axis, by name. Missing values are NaN."""


def series(results: Sequence[dict[str, Any] | None], key: str) -> tuple[list[float], list[float]]:
    """Return the means and the standard deviations of a value in the given cells."""
    means = [math.nan if r is None else r["mean"].get(key, math.nan) for r in results]
    deviations = [0.0 if r is None else r["std"].get(key) or 0.0 for r in results]
    return means, deviations


def save_chart(
    path: Path,
    charts: Sequence[tuple[str, Sequence[float], Series]],
    y_label: str | Sequence[str],
    *,
    titles: Sequence[str] = (),
    log: bool = False,
    both: bool = False,
) -> None:
    """Save a PNG with one or more charts.

    Args:
        path: file to write.
        charts: for each chart the label of the x axis, its values, and the series.
        y_label: label of the y axis of all charts, or one for each chart.
        titles: title of each chart.
        log: whether the x axis is logarithmic, with ticks at its values.
        both: whether the y axis is logarithmic too.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    columns = min(len(charts), 4)
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained", dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=not titles).flatten()
    y_labels = [y_label] * len(charts) if isinstance(y_label, str) else y_label
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for *_, curves in charts for name in curves))}
    for number, (axis, (x_label, x, curves)) in enumerate(zip(axes, charts, strict=False)):
        for name, (means, deviations) in curves.items():
            at, shown = list(x)[: len(means)], {"label": name, "color": colors[name], "markersize": 4, "capsize": 3}
            axis.errorbar(at, means, deviations, marker="o", **shown)
        if log:
            axis.set_xscale("log")
            axis.set_xticks(list(x), [f"{value:g}" for value in x])
        if both:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
        if not log:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.minorticks_off()
        axis.set(xlabel=x_label, ylabel=y_labels[number] if not number or titles else "")
        if titles:
            axis.set_title(titles[number])
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path)
