"""Measure feature drift (Eq. 5 and Fig. 3 of arXiv 2303.17127) and the distance between queue and batch moments.

Drift is the distance that the embeddings of a fixed batch move in one step, as mean and maximum, averaged over an
epoch. The gap is the distance between the moments of the queue and of the batch, before and after adapting. Small
scale: Omniglot (``experiments.omniglot``, queue of 50 %), with the runs of ``experiments.table2``. Paper scale: SOP.

Small scale, 3 seeds (``results/fig3-small.json``, ``.png``), last of 3 epochs: the mean drift of unit vectors in a step
is 0.04 +- 0.01 without memory, 0.06 +- 0.01 with XBM and 0.07 +- 0.01 with XBN, so XBN does not slow down the encoder.
The distance between the means of queue and batch, in standard deviations of the batch, is 0.49 +- 0.13 with XBM
(1.4 +- 0.6 in the first epoch). With XBN it is 0.19 +- 0.01 before adapting and 0 after.

    python -m experiments.fig3_drift --data omniglot=omniglot:FOLDER
    python -m experiments.fig3_drift --scale paper --data sop=sop:ROOT      # not run
    python -m experiments.fig3_drift --from-results
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.pictures import Chart, courses, save_chart
from experiments.retrieval import recipe, rows
from experiments.runs import Experiment, Result, table
from selfsup_xbn.report.comparison import averaged_over

VALUES = {
    "drift": "drift in a step, mean of the images",
    "drift_max": "drift in a step, maximum of the images",
    "gap_mean_before": "means of queue and batch before adapting",
    "gap_std_before": "deviations of queue and batch before adapting",
}
UNITS = {
    "drift": "distance of unit vectors",
    "drift_max": "distance of unit vectors",
    "gap_mean_before": "distance [std of the batch]",
    "gap_std_before": "|ln(std of queue / std of batch)|",
}
COLUMNS = {"recall@1": "Recall@1", "gap_mean_after": "gap of the means after"} | VALUES
SCALES = {
    "small": rows(recipe("omniglot", queue_size="50%"), "no memory", "XBM", "XBN"),
    "paper": rows(recipe("sop"), "no memory", "XBM", "XBN"),
}


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return a table of the last epoch, and save charts of the values over the epochs."""
    cells = {result["label"]: result for result in results}
    charts = [Chart(VALUES[key], "epoch", UNITS[key], *courses(cells, key)) for key in VALUES]
    title = f"{results[0]['config']['data']}: {averaged_over(results)}"
    save_chart(path.with_suffix(".png"), title, charts)
    return table(results, COLUMNS)


if __name__ == "__main__":
    Experiment("fig3", __doc__ or "", SCALES, show).main()
