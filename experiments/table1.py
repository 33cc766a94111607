"""Table 1: Recall@1 of all methods on SOP and In-Shop (arXiv 2303.17127), ResNet-50, D 512, batch 64, memory 50 %.

The paper: SOP 75.94 without memory, 79.63 without at batch 512, XBM 76.80 +- 2.65, XBM* 79.53, XBN 80.62, AXBN 80.73;
In-Shop 88.76, 90.39, 86.17, 90.91, 91.49, 91.51. Small scale: Omniglot (``experiments.omniglot``) with the same rows,
37 runs of one to three minutes, two at a time on two cores of a 2.1 GHz Xeon.

Recall@1 at small scale, 6 seeds, 7 without memory (``results/table1-small.json``): no memory 70.42 +- 0.89, at batch
512 70.63 +- 0.91, XBM 56.97 +- 4.74, XBM* 69.79 +- 0.83, XBN 71.91 +- 0.50, AXBN 72.11 +- 0.48. XBN and AXBN lead and
XBM is last, as in the paper for In-Shop; but a batch of 512 gains little here (3 epochs are 72 steps then) and XBM*
nothing.

    python -m experiments.table1 --data omniglot=omniglot:FOLDER --seeds 6
    python -m experiments.table1 --scale paper --data sop=sop:ROOT --data inshop=inshop:ROOT      # not run here
    python -m experiments.table1 --from-results
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.retrieval import recipe, rows
from experiments.runs import Experiment, Result, table
from selfsup_xbn.config.schema import SuperviseConfig

COLUMNS = {"recall@1": "Recall@1", "recall@10": "Recall@10", "r_precision": "R-precision", "map@r": "MAP@R"}


def cells(name: str, **changes: str) -> dict[str, SuperviseConfig]:
    """The rows of one data set, labelled with its name."""
    found = rows(recipe(name, **changes), label=f"{name}: {{}}")
    return found | rows(recipe(name, batch_size=512), "no memory", label=f"{name}: {{}}, B 512")


def show(results: list[Result], path: Path) -> Sequence[str]:
    """The table, and how far runs are from one another."""
    return [*table(results, COLUMNS), *spread(results)]


def spread(results: list[Result]) -> Iterator[str]:
    """The standard deviation of a run's Recall@1, pooled over all rows but XBM's, whose own is far larger."""
    rows = [result["seeds"].values() for result in results if not result["label"].endswith(": XBM")]
    values = [[found["recall@1"] for found in seeds] for seeds in rows if len(seeds) > 1]
    if values:
        squares = sum((len(found) - 1) * statistics.variance(found) for found in values)
        pooled = math.sqrt(squares / sum(len(found) - 1 for found in values))
        yield f"Standard deviation of a run's Recall@1, pooled over all rows but XBM's: {pooled:.2f}"


SCALES = {"small": cells("omniglot", queue_size="50%"), "paper": cells("sop") | cells("inshop")}

if __name__ == "__main__":
    Experiment("table1", __doc__ or "", SCALES, show).main()
