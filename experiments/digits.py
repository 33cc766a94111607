"""Compare MoCo on digits with a plain queue, XBN and AXBN with raw pixels and an untrained encoder (README table).

python -m experiments.digits                    # train 9 runs, about 1 minute on two cores
python -m experiments.digits --from-results     # print the committed table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.runs import Experiment, Result, table
from selfsup_xbn.config.recipes import RECIPES

CELLS = {name: replace(RECIPES["digits"], adaptation=name, eval_every=0) for name in ("xbm", "xbn", "axbn")}
COLUMNS = {
    "knn_top1_raw_pixels": "raw pixels",
    "knn_top1_untrained": "untrained, projection",
    "knn_top1_backbone_untrained": "untrained, backbone",
    "knn_top1": "trained, projection",
    "knn_top1_backbone": "trained, backbone",
}


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return the table of the results."""
    return table(results, COLUMNS)


if __name__ == "__main__":
    Experiment("digits", __doc__ or "", {"": CELLS}, show).main()
