"""Supervised metric learning on Omniglot: no memory, XBM, XBM*, XBN and AXBN at batch 64, and none, XBM, XBN at 16.

The paper's order (arXiv 2303.17127, Table 1) at a scale that two cores can do: few-shot learning's Conv-4, D 128,
memory 6000, 3 epochs, 28 x 28 drawings as they are, with rotations by 90 degrees as further classes (624 to train on,
344 unseen ones to search). With random rotations, zooms and shifts of the drawings all methods but XBM gain, and no
memory most: 72.3 against XBN's 71.1 (convnet4, 3 seeds). Network and augmentation were chosen on seed 0.

    python -m experiments.omniglot --data omniglot=omniglot:FOLDER     # trains what is not done
    python -m experiments.omniglot --from-results                      # prints the committed table
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.pictures import save_chart, series
from experiments.retrieval import METHODS, recipe, rows
from experiments.runs import Experiment, Result, table

COLUMNS = {"recall@1": "Recall@1", "map@r": "MAP@R", "recall@1_untrained": "untrained", "recall@1_raw_pixels": "pixels"}
BATCHES = (16, 64)
CELLS = {
    **rows(recipe("omniglot"), label="{}, B 64"),
    **rows(recipe("omniglot", batch_size=16), "no memory", "XBM", "XBN", label="{}, B 16"),
}


def show(results: list[Result], path: Path) -> Sequence[str]:
    """The table; draws Recall@1 against the batch size."""
    cells = {result["label"]: result for result in results}
    lines = {name: series([cells.get(f"{name}, B {batch}") for batch in BATCHES], "recall@1") for name in METHODS}
    save_chart(
        path.with_suffix(".png"), [("batch size", BATCHES, lines)], "Recall@1 on unseen characters [%]", log=True
    )
    return table(results, COLUMNS)


if __name__ == "__main__":
    Experiment("omniglot", __doc__ or "", {"": CELLS}, show).main()
