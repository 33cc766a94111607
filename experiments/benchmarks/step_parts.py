"""Where the time of the supervised step goes, beside the two bare products that no step can do without.

    python -m experiments.benchmarks.step_parts [--rows 29775] [--batch 64] [--dim 512] [--steps 200] [--threads 2]

Our step and the products take turns in one process (``parts``). Writes ``results/step-parts-ROWS.json`` and prints
medians, and how often the products would have run in that time, e.g. ::

    softmax and second product                       16.62 ms   0.45
    first product, over the rows' lengths            14.89 ms   0.40
    adapt and measure the rows as they are read       5.87 ms   0.16
    all else                                          1.33 ms   0.04
    pairs with rows of the batch's classes            0.92 ms   0.02
    adapt the queue to the batch                      0.77 ms   0.02
    the miner's threshold                             0.72 ms   0.02
    enqueue the batch                                 0.47 ms   0.01
    find the rows of the batch's classes              0.25 ms   0.01
    backward                                          0.19 ms   0.01
    all                                              42.12 ms   1.13
    bare products                                    37.25 ms   1.00

This was on two cores of an AMD EPYC.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from selfsup_xbn.losses.online import LogSumExp
from torch import Tensor

from experiments.benchmarks.parts import Part, measure, report
from experiments.benchmarks.steps import MIDDLE, bare, supervised_inputs, supervised_ours
from experiments.runs import RESULTS
from selfsup_xbn import FeatureQueue
from selfsup_xbn.losses.pairs import QueueReader

BARE = "bare products"
SETTING = {"rows": 29_775, "batch": 64, "dim": 512, "steps": 200, "threads": 2}
PARTS = (
    Part(FeatureQueue, "adapt", "adapt the queue to the batch", whole=True),
    Part(FeatureQueue, "enqueue", "enqueue the batch"),
    Part(QueueReader, "__init__", "find the rows of the batch's classes"),
    Part(QueueReader, "logits", "first product, over the rows' lengths"),
    Part(QueueReader, "keeps_few", "the miner's threshold"),
    Part(torch.nn.functional, "threshold", "the miner's threshold"),
    Part(LogSumExp, "add", "softmax and second product"),
    Part(LogSumExp, "add_few", "softmax and second product"),
    Part(Tensor, "backward", "backward"),
    Part(FeatureQueue, "_turns", "adapt and measure the rows as they are read", generator=True),
    Part(QueueReader, "paired", "pairs with rows of the batch's classes", generator=True, whole=True),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the results, prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SETTING.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results; name another to try sizes out"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    setting = {name: getattr(options, name) for name in SETTING}
    sizes = (options.batch, options.rows, options.dim, MIDDLE)
    step, products = supervised_ours("xbn", sizes, "cpu"), bare(supervised_inputs, sizes, "cpu")
    found = measure(step, PARTS, BARE, products, options.steps)
    report(found, BARE, setting, options.out / f"step-parts-{options.rows}.json")


if __name__ == "__main__":
    main()
