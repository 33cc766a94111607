"""Charts of results: mean and spread over the seeds, side by side on one sheet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""For each name the means and the standard deviations along the chart's axis; NaN where there is no value."""


def series(results: Sequence[dict[str, Any] | None], key: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a value in each of these cells."""
    means = [math.nan if r is None else r["mean"].get(key, math.nan) for r in results]
    deviations = [0.0 if r is None else r["std"].get(key) or 0.0 for r in results]
    return means, deviations


def course(result: dict[str, Any], key: str) -> tuple[list[int], list[float], list[float]]:
    """Epochs at which a cell's value was measured with every seed, its means and standard deviations."""
    by_seed = [history[key] for history in result["history"].values() if key in history]
    epochs = sorted(set.intersection(*(set(map(int, values)) for values in by_seed))) if by_seed else []
    at = [[values[str(epoch)] for values in by_seed] for epoch in epochs]
    return epochs, [statistics.mean(v) for v in at], [statistics.stdev(v) if len(v) > 1 else 0.0 for v in at]


def save_chart(
    path: Path,
    charts: Sequence[tuple[str, Sequence[float], Series]],
    y_label: str | Sequence[str],
    *,
    titles: Sequence[str] = (),
    log: bool = False,
    both: bool = False,
) -> None:
    """Writes a PNG of charts side by side.

    Args:
        charts: of each chart the x axis' label, its values, and the series.
        y_label: what all of them show, or each.
        titles: one for each chart.
        log: a logarithmic x axis with ticks at its values.
        both: the y axis logarithmic too.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    columns = min(len(charts), 4)
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained", dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=not titles).flatten()
    y_labels = [y_label] * len(charts) if isinstance(y_label, str) else y_label
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for *_, found in charts for name in found))}
    for number, (axis, (x_label, x, found)) in enumerate(zip(axes, charts, strict=False)):
        for name, (means, deviations) in found.items():
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
