"""Table 3: does a normalisation layer at the network's end do what XBN does? L2, L2 + LayerNorm, L2 + BatchNorm.

Recall@1 with XBM and XBN and each head (arXiv 2303.17127). Small scale: Omniglot (``experiments.omniglot``, memory
50 %), 18 runs of two minutes, two at a time on two cores of a 2.1 GHz Xeon; paper scale: SOP and In-Shop.

Recall@1 at small scale, 3 seeds (``results/table3-small.json``)::

               L2             L2 + LN        L2 + BN
    XBM        58.03 +- 6.17  57.37 +- 7.08  69.50 +- 0.66
    XBN        71.64 +- 0.22  72.00 +- 0.50  70.35 +- 0.62

A BatchNorm at the end mends most of what is wrong with XBM, a LayerNorm nothing; XBN with L2 alone is
ahead of XBM with either.

    python -m experiments.table3 --data omniglot=omniglot:FOLDER
    python -m experiments.table3 --scale paper --data sop=sop:ROOT --data inshop=inshop:ROOT      # not run here
    python -m experiments.table3 --from-results
"""

from __future__ import annotations

from experiments.retrieval import recipe, rows
from experiments.runs import Experiment
from experiments.table1 import show
from selfsup_xbn.config.schema import SuperviseConfig

HEADS = {"l2": "L2", "l2+ln": "L2 + LN", "l2+bn": "L2 + BN"}


def cells(name: str) -> dict[str, SuperviseConfig]:
    """Every head with XBM and with XBN."""
    found: dict[str, SuperviseConfig] = {}
    for head, text in HEADS.items():
        found |= rows(recipe(name, head=head, queue_size="50%"), "XBM", "XBN", label=f"{name}: {{}}, {text}")
    return found


SCALES = {"small": cells("omniglot"), "paper": cells("sop") | cells("inshop")}

if __name__ == "__main__":
    Experiment("table3", __doc__ or "", SCALES, show).main()
