"""Measure the time of a queue step (adapt and enqueue), which should not depend on the number of rows M.

    python -m experiments.benchmarks.queue_step

D 128, batch 128, one thread, median of 300 steps with a full queue. All sizes alternate in one process. The results are
written to ``results/queue_step.json``, and a line for each size is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.runs import RESULTS
from selfsup_xbn import FeatureQueue
from selfsup_xbn.runs.environment import environment

SIZES, DIM, BATCH, STEPS = (10_000, 100_000, 1_000_000), 128, 128, 300


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every size and adaptation, print a line for each, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    for adaptation in ("xbm", "xbn", "axbn"):
        queues = {size: FeatureQueue(size, DIM, adaptation) for size in SIZES}
        seconds: dict[int, list[float]] = {size: [] for size in SIZES}
        for queue in queues.values():
            queue.enqueue(torch.randn(queue.size, DIM))
        for _ in range(STEPS):
            batch = torch.randn(BATCH, DIM)
            for size, queue in queues.items():
                started = time.perf_counter()
                queue.adapt(batch)
                queue.enqueue(batch)
                seconds[size].append(time.perf_counter() - started)
        for size in SIZES:
            milliseconds = 1000 * statistics.median(seconds[size])
            results.append({"adaptation": adaptation, "rows": size, "milliseconds": round(milliseconds, 4)})
            ratio = milliseconds / (1000 * statistics.median(seconds[SIZES[0]]))
            print(f"{adaptation:<5} M {size:>9,}  {milliseconds:.3f} ms  {ratio:.2f} x of M {SIZES[0]:,}")
    setting = {"dim": DIM, "batch": BATCH, "steps": STEPS, "threads": 1, "environment": environment()}
    (options.out / "queue_step.json").write_text(json.dumps(setting | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
