"""Draw charts of results: mean and standard deviation over the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfsup_xbn.report.colors import COLORS, series_styles
from selfsup_xbn.runs.results import Result, course

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Means and standard deviations along the x axis, by name. Missing values are NaN."""


class Chart(NamedTuple):
    """A chart of a picture.

    Attributes:
        title: Title, or "" for none.
        x_label: Label of the x axis, with the unit.
        y_label: Label of the y axis, with the unit.
        x: Values along the x axis.
        curves: The series.
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    curves: Series


def series(results: Sequence[dict[str, Any] | None], key: str) -> tuple[list[float], list[float]]:
    """Return the means and the standard deviations of a value in the given cells."""
    means = [math.nan if r is None else r["mean"].get(key, math.nan) for r in results]
    deviations = [0.0 if r is None else r["std"].get(key) or 0.0 for r in results]
    return means, deviations


def courses(cells: Mapping[str, Result], key: str) -> tuple[list[int], Series]:
    """Return the epochs at which a value was measured with every seed of every cell, and the series of the cells.

    Cells without the value have no series.

    Example:
        >>> values = {"a": {"1": 3.0, "2": 2.0}, "b": {"1": 4.0}}
        >>> courses({name: {"history": {"0": {"loss": by_epoch}}} for name, by_epoch in values.items()}, "loss")
        ([1], {'a': ([3.0], [0.0]), 'b': ([4.0], [0.0])})
    """
    measured = {name: values for name, cell in cells.items() if (values := course(cell, key))[0]}
    epochs = sorted(set.intersection(*(set(values[0]) for values in measured.values()))) if measured else []
    curves = {}
    for name, (known, means, deviations) in measured.items():
        places = [known.index(epoch) for epoch in epochs]
        curves[name] = [means[place] for place in places], [deviations[place] for place in places]
    return epochs, curves


def save_chart(
    path: Path,
    title: str,
    charts: Sequence[Chart],
    *,
    log: bool = False,
    both: bool = False,
    share_y: bool = False,
    legend_columns: int = 5,
) -> None:
    """Save a PNG with one chart, or with rows of two, above a legend of all series.

    A series "XBN, ..." has the color of XBN, with dashes and a marker that no other series of XBN has.

    Args:
        path: file to write.
        title: title of the picture.
        charts: the charts.
        log: whether the x axis is logarithmic, with ticks at its values.
        both: whether the y axis is logarithmic too.
        share_y: whether the charts of a row have the same range on the y axis.
        legend_columns: number of columns of the legend.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    columns = min(len(charts), 2)
    rows = -(-len(charts) // columns)
    names = list(dict.fromkeys(name for chart in charts for name in chart.curves))
    height = 3.5 * rows + 0.5 + 0.22 * -(-len(names) // legend_columns)
    figure = Figure(figsize=(6.4 if columns == 1 else 10, height), layout="constrained", dpi=100)
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_y else False).flatten()
    methods = [method if (method := name.partition(", ")[0]) in COLORS else name for name in names]
    styles = dict(zip(names, series_styles(methods), strict=True))
    for axis, chart in zip(axes, charts, strict=False):
        for number, (name, curve) in enumerate(chart.curves.items()):
            x = _apart(chart.x, number - (len(chart.curves) - 1) / 2, log) if any(curve[1]) else list(chart.x)
            style = styles[name] | {"label": name, "markersize": 4, "capsize": 3}
            axis.errorbar(x[: len(curve[0])], curve[0], curve[1] if any(curve[1]) else None, **style)
        if log:
            axis.set_xscale("log")
            axis.set_xticks(list(chart.x), [f"{value:g}" for value in chart.x])
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if both:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axis.set_title(chart.title, fontsize="medium")
        axis.grid(alpha=0.3)
    shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles, labels = list(shown.values()), list(shown)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(legend_columns, len(shown)), frameon=False)
    figure.savefig(path)


def _apart(x: Sequence[float], place: float, log: bool) -> list[float]:
    """Return values of x moved a little to the place of a series, so that no error bar hides another."""
    return [value * 1.02**place if log else value + 0.05 * place for value in x]
