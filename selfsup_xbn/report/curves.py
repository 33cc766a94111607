"""Pictures of a run, made from its ``metrics.jsonl`` alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from selfsup_xbn.runs.folder import read_config, read_metrics

PANELS = (
    ("loss", {"loss": "loss"}),
    (
        "k-NN top-1 (%)",
        {
            "knn_top1": "projection",
            "knn_top1_backbone": "backbone",
            "knn_top1_untrained": "projection, untrained",
            "knn_top1_backbone_untrained": "backbone, untrained",
            "knn_top1_raw_pixels": "raw pixels",
        },
    ),
    (
        "Recall@1 (%)",
        {"recall@1": "trained", "recall@1_untrained": "untrained", "recall@1_raw_pixels": "raw pixels"},
    ),
    ("feature drift (Eq. 5)", {"drift": "mean", "drift_max": "maximum"}),
    (
        "moments: queue against batch (std)",
        {"gap_mean_before": "mean, before", "gap_mean_after": "mean, after"},
    ),
    ("Kalman gain", {"gain": "gain"}),
)


def draw_curves(folder: Path) -> Path:
    """Draws ``curves.png``: loss, k-NN with its baselines, drift and gain by epoch, as far as they were logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config, records = read_config(folder), read_metrics(folder)
    panels = [(title, keys) for title, keys in PANELS if any(key in record for key in keys for record in records)]
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{config.mode} on {config.data}, {config.adaptation}, seed {config.seed}")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for color, (key, label) in enumerate(keys.items()):
            _curve(axes, points_of(records, key), label, f"C{color}")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize="small")
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path


Points = list[tuple[float, float]]


def points_of(records: list[dict[str, Any]], key: str) -> Points:
    """(epoch, value) of each record that has a finite number there."""
    numbers = [(record["epoch"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    return [(float(epoch), float(value)) for epoch, value in numbers if math.isfinite(value)]


def is_baseline(points: Points) -> bool:
    """Whether the value was measured before the first epoch only: what training must beat."""
    return len(points) == 1 and points[0][0] == 0


def _curve(axes: Any, points: Points, label: str, color: str) -> None:
    """A curve; a baseline is a dashed line across."""
    if is_baseline(points):
        axes.axhline(points[0][1], label=label, color=color, linestyle="--", linewidth=1)
    elif points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, marker="." if len(points) < 40 else None)


COLUMNS = {
    "knn_top1": "k-NN, projection",
    "knn_top1_backbone": "k-NN, backbone",
    "recall@1": "Recall@1",
    "recall@10": "Recall@10",
    "recall@100": "Recall@100",
    "recall@1000": "Recall@1000",
    "r_precision": "R-precision",
    "map@r": "MAP@R",
}
"""Values that a probe may give, as a reader knows them; all in percent."""


def comparison_table(found: dict[str, Any]) -> list[str]:
    """Rows raw pixels, untrained encoder, trained encoder; a column for each value that was measured, in percent."""
    names = [name for name in COLUMNS if name in found]
    lines = [f"{'percent':<20}" + "".join(f"{COLUMNS[name]:>18}" for name in names)]
    for row, values in comparison_rows(found, names).items():
        lines.append(f"{row:<20}" + "".join(f"{'-':>18}" if v is None else f"{v:>18.2f}" for v in values))
    return lines


def comparison_rows(found: dict[str, Any], names: list[str]) -> dict[str, list[float | None]]:
    """The values ``names`` of raw pixels, untrained encoder and trained encoder; ``None`` where there is none."""
    rows = {"raw pixels": "_raw_pixels", "untrained encoder": "_untrained", "trained encoder": ""}
    # Pixels have no projection apart from a backbone: their one k-NN stands in both columns.
    return {
        row: [found.get(name + suffix, found.get(name.removesuffix("_backbone") + suffix)) for name in names]
        for row, suffix in rows.items()
    }


def latest(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The last number of each key, or ``None`` where it was not finite."""
    known = int | float | None
    return {key: value for record in records for key, value in record.items() if isinstance(value, known)}


def result_lines(folder: Path) -> list[str]:
    """What a finished run found, and where it is."""
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    return ["", *comparison_table(latest(read_metrics(folder))), "", f"run folder: {folder}  ({files})"]
