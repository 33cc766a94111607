"""Table and picture of a comparison: mean and standard deviation over the seeds of each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsup_xbn.errors import printable
from selfsup_xbn.evaluation.summary import columns
from selfsup_xbn.report.colors import method_name, series_styles
from selfsup_xbn.runs.results import Result, course, difference, value_text
from selfsup_xbn.utils.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison_lines(results: Sequence[Result], metric: str) -> list[str]:
    """Return a Markdown table in percent, with a row for each cell.

    The columns are the metric, its difference to the first cell, and the metric of the untrained encoder and of raw
    pixels.

    Args:
        results: Cells of a comparison. The first one is the reference.
        metric: Key of the metric, e.g. ``"recall@1"``.

    Returns:
        The lines of the table, and a line that explains the numbers.

    Example:
        >>> seeds = {"0": {"recall@1": 50.0}, "1": {"recall@1": 54.0}}
        >>> cell = {"label": "XBN", "seeds": seeds, "mean": {"recall@1": 52.0}, "std": {"recall@1": 2.83}}
        >>> print(comparison_lines([cell], "recall@1")[2])
        | XBN | 52.00 ± 2.83 |            | -         | -          | 2     |
    """
    reference = results[0]
    title = columns().get(metric, metric)
    rows = [["", title, "difference", "untrained", "raw pixels", "seeds"]]
    for result in results:
        values = [value_text(result, metric + suffix) for suffix in ("", "_untrained", "_raw_pixels")]
        change = "" if result is reference else _difference_text(result, reference, metric)
        rows.append([result["label"], values[0], change, *values[1:], str(len(result["seeds"]))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [
        lines[0],
        "|" + "|".join("-" * (width + 2) for width in widths) + "|",
        *lines[1:],
        "",
        "Percent: mean ± standard deviation over the seeds; difference to "
        f"{reference['label']!r}, paired by seed: mean ± standard error.",
    ]


def _difference_text(result: Result, reference: Result, metric: str) -> str:
    change = difference(result, reference, metric)
    if change is None:
        return "-"
    return f"{change.mean:+.2f}" + ("" if change.error is None else f" ± {change.error:.2f}")


def averaged_over(results: Sequence[Result]) -> str:
    """Return what the values in a picture of results are.

    Args:
        results: Cells of a comparison.

    Example:
        >>> averaged_over([{"seeds": {"0": {}}}]), averaged_over([{"seeds": {"0": {}, "1": {}}}])
        ('one seed', 'mean and standard deviation of 2 seeds')
    """
    numbers = [len(result["seeds"]) for result in results]
    fewest, most = min(numbers), max(numbers)
    if most == 1:
        return "one seed"
    return f"mean and standard deviation of {fewest if fewest == most else f'{fewest} to {most}'} seeds"


def draw_comparison(results: Sequence[Result], metric: str, path: Path) -> None:
    """Plot a metric against the epoch: the mean of each cell as a curve, its standard deviation as a band.

    A curve begins at epoch 0 with the untrained encoder. Raw pixels are a line, if they are equal for all cells. Cells
    with the same method have the same color, and differ in dashes and markers.

    Args:
        results: Cells of a comparison.
        metric: Key of the metric.
        path: PNG file to write.

    Raises:
        UserError: The file could not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = series_styles([method_name(result["config"]) for result in results])
    for result, style in zip(results, styles, strict=True):
        _band(axes, result, metric, style)
    pixels = [result["mean"].get(f"{metric}_raw_pixels") for result in results]
    if len(set(pixels)) == 1 and pixels[0] is not None:
        axes.axhline(pixels[0], color="black", linestyle="--", linewidth=1, label="raw pixels")
    figure.suptitle(printable(_title([result["config"] for result in results])), parse_math=False)
    begin = " (0: untrained)" if any(f"{metric}_untrained" in result["mean"] for result in results) else ""
    axes.set(xlabel=f"epoch{begin}", ylabel=f"{columns().get(metric, metric)} [%]")
    axes.set_title(averaged_over(results), fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _add_legend(figure)
    with replacing(path, remedy="free disk space, and repeat the command") as file:
        figure.savefig(file, dpi=110, bbox_inches="tight")


def _add_legend(figure: Figure) -> None:
    """Add a legend below the axes, with as many columns as fit (at most 3), and the height that its rows need."""
    for ncols in (3, 2, 1):
        legend = figure.legend(loc="outside lower center", fontsize="small", ncols=ncols, frameon=False, handlelength=3)
        box = legend.get_window_extent()
        if ncols == 1 or box.width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + max(0.0, box.height / figure.dpi - 0.5))


def _band(axes: Any, result: Result, metric: str, style: dict[str, str]) -> None:
    epochs, means, deviations = course(result, metric)
    if (untrained := result["mean"].get(f"{metric}_untrained")) is not None:
        epochs, means = [0, *epochs], [untrained, *means]
        deviations = [result["std"].get(f"{metric}_untrained") or 0.0, *deviations]
    low, high = ([m + sign * s for m, s in zip(means, deviations, strict=True)] for sign in (-1, 1))
    axes.plot(epochs, means, **style, markersize=4, label=printable(result["label"]).replace("$", r"\$"))
    axes.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _title(configs: Sequence[Mapping[str, Any]]) -> str:
    """Return the mode, and the data set and the batch size if they are equal for all cells."""
    first = configs[0]
    parts = [first["mode"]]
    if all(config["data"] == first["data"] for config in configs):
        parts.append(f"on {first['data']}")
    if all(config["batch_size"] == first["batch_size"] for config in configs):
        parts.append(f"with batch size {first['batch_size']}")
    return " ".join(parts)
