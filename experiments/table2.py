"""Compare the Recall@1 of all methods on DeepFashion2 (Table 2 of arXiv 2303.17127).

Paper scale: consumer-to-shop retrieval, queue of 100 %, gain interval of 10 steps. The paper reports: 36.45 without
memory, XBM 41.22 +- 2.96, XBN 45.12, AXBN 45.33. Small scale, also with a queue of 100 %: Omniglot, with the runs of
``experiments.fig1_sweeps`` except AXBN, and Cars196 with unseen test classes, 64 pixels, a four-layer convnet with
random initial weights, three epochs.

    python -m experiments.table2 --data omniglot=omniglot:FOLDER --data cars196=cars196:FOLDER
    python -m experiments.table2 --scale paper --data deepfashion2=deepfashion2:ROOT      # not run
    python -m experiments.table2 --from-results

Recall@1 at small scale, 3 seeds (``results/table2-small.json``), two to nine minutes a run, two in parallel, two
cores::

                 no memory      XBM            XBN            AXBN
    omniglot     69.69 +- 0.80  57.80 +- 7.04  70.93 +- 0.35  70.84 +- 0.06
    cars196       5.91 +- 0.71   7.24 +- 0.22   5.20 +- 1.31   5.28 +- 1.21

On Cars196 no method learns: untrained networks reach 5.81, raw pixels 8.99. The standard deviation of each dimension
over a batch falls below 0.015, and all embeddings are so close that the miner, which keeps positives at distances above
0.2, keeps none. The loss falls to 0.5 or less, or stays at 8.5 (all seeds of XBM, one seed each of XBN and AXBN). The
small scale therefore allows no conclusion about photographs, which need ImageNet weights or a longer training.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.retrieval import recipe, rows
from experiments.runs import Experiment
from experiments.table1 import show

METHODS = ("no memory", "XBM", "XBN", "AXBN")
CARS = recipe(
    "cars196",
    backbone="convnet4",
    weights="",
    dim=128,
    image_size=64,
    lr=1e-3,
    schedule="constant",
    epochs=3,
    head_epochs=0,
    workers=0,
    gain_interval=10,
)
OMNIGLOT = recipe("omniglot", queue_size="100%")
SCALES = {
    "small": {
        **rows(OMNIGLOT, "no memory", "XBM", "XBN", label="omniglot: {}"),
        **rows(replace(OMNIGLOT, gain_interval=10), "AXBN", label="omniglot: {}"),
        **rows(CARS, *METHODS, label="cars196: {}"),
    },
    "paper": rows(recipe("deepfashion2"), *METHODS),
}

if __name__ == "__main__":
    Experiment("table2", __doc__ or "", SCALES, show).main()
