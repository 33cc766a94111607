"""Compare no memory, XBM, XBM*, XBN and AXBN in supervised metric learning on Omniglot.

The methods of Table 1 of arXiv 2303.17127 at a scale for two cores: Conv-4, D 128, queue of 6000 rows, 3 epochs, 28 x
28 drawings without augmentation, with rotations by 90 degrees as additional classes (624 training classes, 344 unseen
test classes). With random rotations, zooms and shifts of the drawings all methods except XBM improve. No memory
improves most: 72.3, compared with 71.1 for XBN (convnet4, 3 seeds). Network and augmentation were chosen on seed 0.

    python -m experiments.omniglot --data omniglot=omniglot:FOLDER     # train the missing runs
    python -m experiments.omniglot --from-results                      # print the committed table
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.pictures import Chart, save_chart, series
from experiments.retrieval import METHODS, recipe, rows
from experiments.runs import Experiment, Result, table
from selfsup_xbn.report.comparison import averaged_over

COLUMNS = {"recall@1": "Recall@1", "map@r": "MAP@R", "recall@1_untrained": "untrained", "recall@1_raw_pixels": "pixels"}
BATCHES = (16, 64)
CELLS = {
    **rows(recipe("omniglot"), label="{}, B 64"),
    **rows(recipe("omniglot", batch_size=16), "no memory", "XBM", "XBN", label="{}, B 16"),
}


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return the table of the results, and save a chart of Recall@1 against the batch size."""
    cells = {result["label"]: result for result in results}
    lines = {name: series([cells.get(f"{name}, B {batch}") for batch in BATCHES], "recall@1") for name in METHODS}
    chart = Chart("", "batch size [images]", "Recall@1 on unseen characters [%]", BATCHES, lines)
    save_chart(path.with_suffix(".png"), f"Omniglot: {averaged_over(results)}", [chart], log=True)
    return table(results, COLUMNS)


if __name__ == "__main__":
    Experiment("omniglot", __doc__ or "", {"": CELLS}, show).main()
