"""Measure the time of the parts of the supervised step, compared with its two matrix products.

    python -m experiments.benchmarks.step_parts [--rows 29775] [--batch 64] [--dim 512] [--steps 200] [--threads 2]

The step and the products alternate in one process (``parts``). The results are written to
``results/step-parts-ROWS.json``. The program prints medians and their ratio to the time of the products.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.benchmarks.parts import Part, measure, report
from experiments.benchmarks.steps import MIDDLE, bare, supervised_inputs, supervised_ours
from experiments.runs import RESULTS
from selfsup_xbn import FeatureQueue
from selfsup_xbn.losses import blockwise, pairs

BARE = "bare products"
SETTING = {"rows": 29_775, "batch": 64, "dim": 512, "steps": 200, "threads": 2}
PARTS = (
    Part(FeatureQueue, "adapt", "adapt the queue to the batch", whole=True),
    Part(FeatureQueue, "enqueue", "enqueue the batch"),
    Part(pairs.Pairs, "__init__", "find the rows of the batch's classes"),
    Part(pairs, "unit_embeddings", "normalize the rows"),
    Part(pairs.Pairs, "negatives_only", "adapt the rows, first product, threshold", generator=True),
    Part(pairs.Pairs, "mixed", "pairs with rows of the batch's classes", generator=True, whole=True),
    Part(blockwise._OnlineSoftmax, "add_", "softmax and second product"),
    Part(Tensor, "backward", "backward"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all parts, write the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SETTING.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    setting = {name: getattr(options, name) for name in SETTING}
    sizes = (options.batch, options.rows, options.dim, MIDDLE)
    step, products = supervised_ours("xbn", sizes, "cpu"), bare(supervised_inputs, sizes, "cpu")
    milliseconds = measure(step, PARTS, BARE, products, options.steps)
    report(milliseconds, BARE, setting, options.out / f"step-parts-{options.rows}.json")


if __name__ == "__main__":
    main()
