"""Compare the Recall@1 of all methods on SOP and In-Shop (Table 1 of arXiv 2303.17127).

Paper scale: ResNet-50, D 512, batch 64, queue of 50 %. The paper reports: SOP 75.94 without memory, 79.63 without at
batch 512, XBM 76.80 +- 2.65, XBM* 79.53, XBN 80.62, AXBN 80.73; In-Shop 88.76, 90.39, 86.17, 90.91, 91.49, 91.51. Small
scale: Omniglot (``experiments.omniglot``) with the same rows, 37 runs of one to three minutes, two in parallel on two
cores of a 2.1 GHz Xeon.

Recall@1 at small scale, 6 seeds, 7 without memory (``results/table1-small.json``): no memory 70.42 +- 0.89, at batch
512 70.63 +- 0.91, XBM 56.97 +- 4.74, XBM* 69.79 +- 0.83, XBN 71.91 +- 0.50, AXBN 72.11 +- 0.48. XBN and AXBN are best
and XBM is worst, as in the paper for In-Shop. Unlike in the paper, a batch of 512 improves little (3 epochs are 72
steps), and XBM* does not improve.

    python -m experiments.table1 --data omniglot=omniglot:FOLDER --seeds 6
    python -m experiments.table1 --scale paper --data sop=sop:ROOT --data inshop=inshop:ROOT      # not run
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
    """Return the cells of one data set, labelled with its name."""
    default_batch = rows(recipe(name, **changes), label=f"{name}: {{}}")
    return default_batch | rows(recipe(name, batch_size=512), "no memory", label=f"{name}: {{}}, B 512")


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return the table of the results and the standard deviation of a run."""
    return [*table(results, COLUMNS), *spread(results)]


def spread(results: list[Result]) -> Iterator[str]:
    """Yield the standard deviation of Recall@1, pooled over all rows except XBM, whose deviation is much larger."""
    rows = [result["seeds"].values() for result in results if not result["label"].endswith(": XBM")]
    values = [[final["recall@1"] for final in seeds] for seeds in rows if len(seeds) > 1]
    if values:
        squares = sum((len(recalls) - 1) * statistics.variance(recalls) for recalls in values)
        pooled = math.sqrt(squares / sum(len(recalls) - 1 for recalls in values))
        yield f"Standard deviation of Recall@1, pooled over all rows except XBM: {pooled:.2f}"


SCALES = {"small": cells("omniglot", queue_size="50%"), "paper": cells("sop") | cells("inshop")}

if __name__ == "__main__":
    Experiment("table1", __doc__ or "", SCALES, show).main()
