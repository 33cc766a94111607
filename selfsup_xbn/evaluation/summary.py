"""The metrics of a run, in one table from which the epoch's line, the results' table and the curves derive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASELINES = {"raw pixels": "_raw_pixels", "untrained encoder": "_untrained", "trained encoder": ""}
"""Rows of a results table: what was evaluated, and what follows a metric's name in the record."""


@dataclass(frozen=True)
class Metric:
    """A value in the records of a run.

    Attributes:
        name: its key in ``metrics.jsonl``.
        title: its column in a results table; "": none. A metric with a title is in percent, and is measured of raw
            pixels and of the untrained encoder too, as ``NAME_raw_pixels`` and ``NAME_untrained``.
        panel: the title of the plot that shows it; "": none. Metrics with one panel share a plot.
        label: its curve in the panel.
        progress: its text in the line that is printed after an epoch, a format string; "": none.
    """

    name: str
    title: str = ""
    panel: str = ""
    label: str = ""
    progress: str = ""


KNN, RECALL, DRIFT = "k-NN top-1 (%)", "Recall@1 (%)", "feature drift (Eq. 5)"
GAP = "moments: queue against batch (std)"

METRICS = [
    Metric("loss", panel="loss", label="loss", progress="loss {:.3f}"),
    Metric("knn_top1", "k-NN, projection", KNN, "projection", "k-NN {:.1f} %"),
    Metric("knn_top1_backbone", "k-NN, backbone", KNN, "backbone", "(backbone {:.1f} %)"),
    Metric("recall@1", "Recall@1", RECALL, "trained", "Recall@1 {:.1f} %"),
    Metric("recall@10", "Recall@10"),
    Metric("recall@100", "Recall@100"),
    Metric("recall@1000", "Recall@1000"),
    Metric("recall@1_validation", panel=RECALL, label="validation classes", progress="validation {:.1f} %"),
    Metric("r_precision", "R-precision"),
    Metric("map@r", "MAP@R"),
    Metric("drift", panel=DRIFT, label="mean", progress="drift {:.4f}"),
    Metric("drift_max", panel=DRIFT, label="maximum"),
    Metric("gap_mean_before", panel=GAP, label="mean, before"),
    Metric("gap_mean_after", panel=GAP, label="mean, after"),
    Metric("gain", panel="Kalman gain", label="gain"),
    Metric("images_per_second", progress="{:,.0f} images/s"),
]
"""All metrics. An evaluator of your own appends those that it returns."""


def columns() -> dict[str, str]:
    """Return the title of each metric that a results table may show."""
    return {metric.name: metric.title for metric in METRICS if metric.title}


def panels() -> dict[str, dict[str, str]]:
    """Return for each plot of curves the label of each key of a record: compared metrics, their baselines, others."""
    found: dict[str, dict[str, str]] = {metric.panel: {} for metric in METRICS if metric.panel}
    for panel, labels in found.items():
        compared = [metric for metric in METRICS if metric.panel == panel and metric.title]
        labels |= {metric.name: metric.label for metric in compared}
        for metric in compared:
            untrained = "untrained" if metric.label == "trained" else f"{metric.label}, untrained"
            labels[f"{metric.name}_untrained"] = untrained
        labels |= {f"{metric.name}_raw_pixels": "raw pixels" for metric in compared[:1]}
        labels |= {metric.name: metric.label for metric in METRICS if metric.panel == panel and not metric.title}
    return found


def progress_text(record: Mapping[str, Any]) -> list[str]:
    """Return the texts of a record's metrics for the line that is printed after an epoch."""
    return [m.progress.format(record[m.name]) for m in METRICS if m.progress and record.get(m.name) is not None]


def comparison_table(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table: raw pixels, untrained and trained encoder, a column for each metric, in percent."""
    titles = {name: title for name, title in columns().items() if name in record}
    lines = [f"{'percent':<20}" + "".join(f"{title:>18}" for title in titles.values())]
    for row, values in comparison_rows(record, list(titles)).items():
        lines.append(f"{row:<20}" + "".join(f"{'-':>18}" if v is None else f"{v:>18.2f}" for v in values))
    return lines


def comparison_rows(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[float | None]]:
    """Return the values ``names`` of raw pixels, untrained and trained encoder; ``None`` where there is none."""
    # Pixels have no projection apart from a backbone: their one k-NN stands in both columns.
    return {
        row: [record.get(name + suffix, record.get(name.removesuffix("_backbone") + suffix)) for name in names]
        for row, suffix in BASELINES.items()
    }


def latest(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last number of each key, or ``None`` where it was not finite."""
    known = int | float | None
    return {key: value for record in records for key, value in record.items() if isinstance(value, known)}
