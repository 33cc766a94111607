"""Compare all methods with a larger batch and with XBM* on the smaller data sets (Table 2 of arXiv 2303.17127).

To the rows of Table 1 it adds no memory at batch 512, and XBM*, which adds the loss within the batch. Paper scale:
ResNet-50, D 512, batch 64, a memory of 50 %. The paper reports Recall@1::

               no memory  no memory, B 512  XBM            XBM*   XBN    AXBN
    SOP        75.94      79.63             76.80 +- 2.65  79.53  80.62  80.73
    In-Shop    88.76      90.39             86.17 +- 0.18  90.91  91.49  91.51

Small scale: Omniglot (``experiments.omniglot``) with the same rows, 37 runs of one to three minutes, two in parallel on
two cores of a 2.1 GHz Xeon.

Recall@1 at small scale, 6 seeds, 7 without memory (``results/table2-small.json``): no memory 70.42 +- 0.89, at batch
512 70.63 +- 0.91, XBM 56.97 +- 4.74, XBM* 69.79 +- 0.83, XBN 71.91 +- 0.50, AXBN 72.11 +- 0.48. XBN and AXBN are best
and XBM is worst, as in the paper for In-Shop. Unlike in the paper, a batch of 512 improves little (3 epochs are 72
steps), and XBM* does not improve.

    python -m experiments.table2 --data omniglot=omniglot:FOLDER --seeds 6
    python -m experiments.table2 --scale paper --data sop=sop:ROOT --data inshop=inshop:ROOT      # not run
    python -m experiments.table2 --from-results
"""

from __future__ import annotations

from experiments.retrieval import recipe, show, table2_rows
from experiments.runs import Experiment

SCALES = {
    "small": table2_rows(recipe("omniglot", queue_size="50%"), label="omniglot: {}"),
    "paper": table2_rows(recipe("sop"), label="sop: {}") | table2_rows(recipe("inshop"), label="inshop: {}"),
}

if __name__ == "__main__":
    Experiment("table2", __doc__ or "", SCALES, show).main()
