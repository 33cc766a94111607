"""Table of all metrics, which defines the progress line of an epoch, the results table and the plots of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASELINES = {"raw pixels": "_raw_pixels", "untrained encoder": "_untrained", "trained encoder": ""}
"""Rows of a results table, with the suffix of the metrics' names in the record. The untrained encoder has the
weights with which a run begins: random ones, or those of ``--weights`` with a random head."""


@dataclass(frozen=True)
class Metric:
    """A value in the records of a run.

    Attributes:
        name: The key in ``metrics.jsonl``.
        title: The title of the column in a results table, or "" for no column. A metric with a title is in percent. It
            is also measured for raw pixels and for the untrained encoder, as ``NAME_raw_pixels`` and
            ``NAME_untrained``.
        panel: The title of the plot, or "" for no plot. Metrics with the same panel share a plot.
        label: The label of the curve in the plot.
        progress: The format string of the text in the progress line of an epoch, or "" for no text.
    """

    name: str
    title: str = ""
    panel: str = ""
    label: str = ""
    progress: str = ""


KNN, RECALL, DRIFT = "k-NN top-1 [%]", "Recall@1 [%]", "feature drift (Eq. 5)"
RESIDUAL = "drift residual: rows against images today"
GAP = "gap of the means [batch std; best: 0]"

METRICS = [
    Metric("loss", panel="loss", label="loss", progress="loss {:.3f}"),
    Metric("head_loss", panel="loss", label="head epochs", progress="head loss {:.3f}"),
    Metric("knn_top1", "k-NN, projection", KNN, "projection", "k-NN {:.1f} %"),
    Metric("knn_top1_backbone", "k-NN, backbone", KNN, "backbone", "(backbone {:.1f} %)"),
    Metric("recall@1", "Recall@1", RECALL, "trained", "Recall@1 {:.1f} %"),
    Metric("recall@1_backbone", "Recall@1, backbone", RECALL, "backbone", "(backbone {:.1f} %)"),
    Metric("recall@10", "Recall@10"),
    Metric("recall@100", "Recall@100"),
    Metric("recall@1000", "Recall@1000"),
    Metric("knn_top1_validation", panel=KNN, label="validation", progress="validation {:.1f} %"),
    Metric("recall@1_validation", panel=RECALL, label="validation classes", progress="validation {:.1f} %"),
    Metric("r_precision", "R-precision"),
    Metric("map@r", "MAP@R"),
    Metric("drift", panel=DRIFT, label="mean", progress="drift {:.4f}"),
    Metric("drift_max", panel=DRIFT, label="maximum"),
    Metric("gap_mean_before", panel=GAP, label="before the adaptation"),
    Metric("gap_mean_after", panel=GAP, label="after the adaptation"),
    Metric("residual", panel=RESIDUAL, label="adapted rows"),
    Metric("residual_unadapted", panel=RESIDUAL, label="rows as they were enqueued"),
    Metric("gain", panel="Kalman gain", label="gain"),
    Metric("images_per_second", progress="{:,.0f} images/s"),
]
"""All metrics. A custom evaluator appends the metrics that it returns."""


def columns() -> dict[str, str]:
    """Return the title of each metric that has a column in results tables.

    Example:
        >>> columns()["recall@1"]
        'Recall@1'
    """
    return {metric.name: metric.title for metric in METRICS if metric.title}


def panels() -> dict[str, dict[str, str]]:
    """Return the curves of each plot, as labels by the key of the record.

    The metrics with a column in results tables come first, then their baselines, then the other metrics.

    Example:
        >>> panels()["loss"]
        {'loss': 'loss', 'head_loss': 'head epochs'}
    """
    curves: dict[str, dict[str, str]] = {metric.panel: {} for metric in METRICS if metric.panel}
    for panel, labels in curves.items():
        compared = [metric for metric in METRICS if metric.panel == panel and metric.title]
        labels |= {metric.name: metric.label for metric in compared}
        for metric in compared:
            untrained = "untrained" if metric.label == "trained" else f"{metric.label}, untrained"
            labels[f"{metric.name}_untrained"] = untrained
        labels |= {f"{metric.name}_raw_pixels": "raw pixels" for metric in compared[:1]}
        labels |= {metric.name: metric.label for metric in METRICS if metric.panel == panel and not metric.title}
    return curves


def progress_text(record: Mapping[str, Any]) -> list[str]:
    """Return the texts of the metrics for the progress line of an epoch.

    Args:
        record: The metrics of the epoch by name.

    Example:
        >>> progress_text({"epoch": 1, "loss": 2.5})
        ['loss 2.500']
    """
    return [m.progress.format(record[m.name]) for m in METRICS if m.progress and record.get(m.name) is not None]


def comparison_table(record: Mapping[str, Any], *, head: bool = True) -> list[str]:
    """Return the lines of a results table in percent, with a row for each of ``BASELINES`` and a column per metric.

    Rows without values are left out.

    Args:
        record: The metrics by name, with or without the suffixes of ``BASELINES``.
        head: Whether the encoder has a head. Without a head the embeddings are the features of the backbone.

    Example:
        >>> for line in comparison_table({"recall@1_raw_pixels": 50.0, "recall@1": 75.0}):
        ...     print(line)
        percent                       Recall@1
        raw pixels                       50.00
        trained encoder                  75.00
    """
    titles = {name: title for name, title in columns().items() if name in record}
    others = [name for name in record if name not in titles and re.fullmatch(r"recall@\d+", name)]
    titles |= {name: name.title() for name in others}  # values of K that a user chose
    if not titles:
        return []
    if not head:
        titles = {name: title.replace("projection", "backbone") for name, title in titles.items()}
    widths = [max(18, len(title) + 2) for title in titles.values()]
    header = zip(titles.values(), widths, strict=True)
    lines = [f"{'percent':<20}" + "".join(f"{title:>{width}}" for title, width in header)]
    for row, values in comparison_rows(record, list(titles)).items():
        if all(value is None for value in values):
            continue
        cells = zip(("-" if value is None else f"{value:.2f}" for value in values), widths, strict=True)
        lines.append(f"{row:<20}" + "".join(f"{cell:>{width}}" for cell, width in cells))
    return lines


def comparison_rows(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[float | None]]:
    """Return the values of each row of a results table, with ``None`` for missing values.

    Args:
        record: The metrics by name, with or without the suffixes of ``BASELINES``.
        names: The names of the metrics, without suffixes.

    Example:
        >>> comparison_rows({"recall@1": 75.0}, ["recall@1"])["trained encoder"]
        [75.0]
    """
    # Raw pixels have neither a projection nor a backbone, so both columns show their only k-NN accuracy.
    return {
        row: [record.get(name + suffix, record.get(name.removesuffix("_backbone") + suffix)) for name in names]
        for row, suffix in BASELINES.items()
    }


def latest(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last number of each key, or ``None`` if it was not finite.

    Args:
        records: The records of a run, in order.

    Example:
        >>> latest([{"loss": 2.5}, {"loss": 2.0, "recipe": "digits"}])
        {'loss': 2.0}
    """
    number = int | float | None
    return {key: value for record in records for key, value in record.items() if isinstance(value, number)}
