"""Measure how far the rows of a memory are from what the encoder of today makes of their images.

The drift residual is the mean squared distance of 256 rows, as unit vectors, to new embeddings of their images
(``--drift-residual``). It is measured for the rows as XBN moves them, and for the same rows as they were enqueued,
which is what a memory without adaptation (XBM) holds. The random views of the images differ too, which is a floor for
both. Each value is the mean over an epoch.

    python -m experiments.drift_residual --data omniglot=omniglot:FOLDER
    python -m experiments.drift_residual --from-results
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.pictures import Chart, save_chart
from experiments.retrieval import recipe
from experiments.runs import Experiment, Result, table
from selfsup_xbn.report.comparison import averaged_over
from selfsup_xbn.runs.results import course

VALUES = {"residual_unadapted": "XBM", "residual": "XBN"}
CELLS = {
    f"{name}, B {batch}": replace(recipe(name), batch_size=batch, drift_residual=True, drift_every=10)
    for name in ("glyphs", "omniglot")
    for batch in (16, 64)
}


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return Recall@1 and the residuals of each epoch, and save a chart of each cell."""
    lines = ["| | epoch | rows as they were enqueued (XBM) | adapted rows (XBN) | change |", "|---|---|---|---|---|"]
    charts = []
    for result in results:
        courses = {name: course(result, key) for key, name in VALUES.items()}
        epochs = courses["XBN"][0]
        curves = {name: (means, deviations) for name, (_, means, deviations) in courses.items()}
        for epoch, *values in zip(epochs, *curves["XBM"], *curves["XBN"], strict=True):
            plain, plain_std, adapted, adapted_std = values
            change = f"{100 * (adapted / plain - 1):+.0f} %"
            texts = f"{plain:.3f} ± {plain_std:.3f}", f"{adapted:.3f} ± {adapted_std:.3f}", change
            lines.append(f"| {result['label']} | {epoch} | {' | '.join(texts)} |")
        charts.append(Chart(result["label"], "epoch", "squared distance of unit vectors", epochs, curves))
    save_chart(path.with_suffix(".png"), f"Drift residual, {averaged_over(results)}", charts)
    return [*table(results, {"recall@1": "Recall@1"}), "", *lines]


if __name__ == "__main__":
    Experiment("drift_residual", __doc__ or "", {"": CELLS}, show).main()
