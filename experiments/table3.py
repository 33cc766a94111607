"""Compare XBN with a normalization layer at the end of the network (Table 3 of arXiv 2303.17127).

Recall@1 with XBM and XBN for the heads L2, L2 + LayerNorm and L2 + BatchNorm. Small scale: Omniglot
(``experiments.omniglot``, queue of 50 %), 18 runs of two minutes, two in parallel on two cores of a 2.1 GHz Xeon. Paper
scale: SOP.

Recall@1 at small scale, 3 seeds (``results/table3-small.json``)::

               L2             L2 + LN        L2 + BN
    XBM        58.03 +- 6.17  57.37 +- 7.08  69.50 +- 0.66
    XBN        71.64 +- 0.22  72.00 +- 0.50  70.35 +- 0.62

A final BatchNorm recovers most of the loss of XBM, a LayerNorm none of it. XBN with L2 alone is better than XBM with
either.

    python -m experiments.table3 --data omniglot=omniglot:FOLDER
    python -m experiments.table3 --scale paper --data sop=sop:ROOT      # not run
    python -m experiments.table3 --from-results
"""

from __future__ import annotations

from experiments.retrieval import recipe, rows, show
from experiments.runs import Experiment
from selfsup_xbn.config.modes import SuperviseConfig

HEADS = {"l2": "L2", "l2+ln": "L2 + LN", "l2+bn": "L2 + BN"}


def cells(name: str) -> dict[str, SuperviseConfig]:
    """Return the cells of one data set: every head with XBM and with XBN."""
    cells: dict[str, SuperviseConfig] = {}
    for head, text in HEADS.items():
        cells |= rows(recipe(name, head=head, queue_size="50%"), "XBM", "XBN", label=f"{name}: {{}}, {text}")
    return cells


SCALES = {"small": cells("omniglot"), "paper": cells("sop")}

if __name__ == "__main__":
    Experiment("table3", __doc__ or "", SCALES, show).main()
