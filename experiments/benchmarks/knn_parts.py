"""Measure the time of the parts of weighted k-NN, compared with faiss.

    python -m experiments.benchmarks.knn_parts [--rounds 5] [--scale 1] [--threads 2]

10,000 queries in a bank of 50,000 rows, D 512, k 200. Both implementations alternate in one process (``parts``). The
results are written to ``results/knn-parts.json``. The program prints medians and their ratio to the time of faiss, for
example on two cores of an AMD EPYC::

    products                                       3023.54 ms   0.91
    the k largest of each query                     430.51 ms   0.13
    all else                                         42.37 ms   0.01
    queries and bank at unit length                  37.40 ms   0.01
    all                                            3528.82 ms   1.06
    faiss-cpu                                      3338.68 ms   1.00
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.benchmarks.evaluators import knn_faiss, knn_ours
from experiments.benchmarks.parts import Part, measure, report
from experiments.runs import RESULTS
from selfsup_xbn.evaluation import knn, neighbors

FAISS = "faiss-cpu"
PARTS = (
    Part(knn, "normalize_features", "queries and bank at unit length"),
    Part(neighbors, "_products", "products"),
    Part(knn, "top_k", "the k largest of each query"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all parts, write the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="scale of the numbers of rows (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="number of threads (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    setting = {name: getattr(options, name) for name in ("rounds", "scale", "threads")}
    milliseconds = measure(knn_ours(options.scale), PARTS, FAISS, knn_faiss(options.scale), options.rounds)
    report(milliseconds, FAISS, setting, options.out / "knn-parts.json")


if __name__ == "__main__":
    main()
