"""Where the time of the supervised step goes, beside the two bare products that no step can do without.

    python -m experiments.benchmarks.step_parts [--rows 29775] [--batch 64] [--dim 512] [--steps 200] [--threads 2]

Our step and the products take turns in one process. A watch follows the step through its functions on a CPU and adds
each moment to one part. Writes ``results/step-parts-ROWS.json`` and prints medians, and how often the products would
have run in that time, e.g. ::

    first product, over the rows' lengths          11.48 ms   0.52
    softmax and second product                     10.24 ms   0.47
    adapt and measure the rows as they are read     8.35 ms   0.38
    all else of the loss                            1.71 ms   0.08
    pairs with rows of the batch's classes          1.07 ms   0.05
    adapt the queue to the batch                    1.01 ms   0.05
    enqueue the batch                               0.58 ms   0.03
    the miner's threshold                           0.33 ms   0.01
    find the rows of the batch's classes            0.30 ms   0.01
    backward                                        0.24 ms   0.01
    the step                                       35.47 ms   1.62
    bare products                                  21.89 ms   1.00
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from experiments.benchmarks.steps import MIDDLE, Step, bare, supervised_inputs, supervised_ours
from experiments.runs import RESULTS
from selfsup_xbn import FeatureQueue
from selfsup_xbn.online import LogSumExp
from selfsup_xbn.queue_reader import QueueReader
from selfsup_xbn.run_log import environment

REST, STEP, BARE = "all else of the loss", "the step", "bare products"
SETTING = {"rows": 29_775, "batch": 64, "dim": 512, "steps": 200, "threads": 2}
WARM = 5
PARTS: tuple[tuple[Any, str, str], ...] = (
    (FeatureQueue, "adapt", "adapt the queue to the batch"),
    (FeatureQueue, "enqueue", "enqueue the batch"),
    (QueueReader, "__init__", "find the rows of the batch's classes"),
    (QueueReader, "logits", "first product, over the rows' lengths"),
    (QueueReader, "keeps_few", "the miner's threshold"),
    (torch.nn.functional, "threshold", "the miner's threshold"),
    (LogSumExp, "add", "softmax and second product"),
    (LogSumExp, "add_few", "softmax and second product"),
    (Tensor, "backward", "backward"),
)
READS: tuple[tuple[Any, str, str], ...] = (
    (FeatureQueue, "_turns", "adapt and measure the rows as they are read"),
    (QueueReader, "paired", "pairs with rows of the batch's classes"),
)
WHOLE = {part for _, name, part in (*PARTS, *READS) if name in ("adapt", "paired")}
"""Parts whose own calls of the functions above belong to them."""


class Watch:
    """Seconds of each part; at any moment one part is current."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.begin()

    def begin(self) -> None:
        """Forgets what was measured."""
        self.seconds.clear()
        self.current, self.since = REST, time.perf_counter()

    def enter(self, part: str) -> str:
        """Ends the current part and begins another; returns the one that ended."""
        now = time.perf_counter()
        self.seconds[self.current] += now - self.since
        before, self.current, self.since = self.current, part, now
        return before

    def function(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is the part's."""

        def watched(*arguments: Any, **named: Any) -> Any:
            if self.current in WHOLE:
                return function(*arguments, **named)
            before = self.enter(part)
            try:
                return function(*arguments, **named)
            finally:
                self.enter(before)

        return watched

    def generator(self, part: str, generator: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The generator, whose time is the part's; what is done with its values too if the part is a whole."""

        def watched(*arguments: Any, **named: Any) -> Iterator[Any]:
            if self.current in WHOLE:
                yield from generator(*arguments, **named)
                return
            before = self.enter(part)
            for value in generator(*arguments, **named):
                if part not in WHOLE:
                    self.enter(before)
                yield value
                before = before if part in WHOLE else self.enter(part)
            self.enter(before)

        return watched


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
    setting = {name: getattr(options, name) for name in SETTING} | {"environment": environment()}
    sizes = (options.batch, options.rows, options.dim, MIDDLE)
    found = measure(supervised_ours("xbn", sizes, "cpu"), bare(supervised_inputs, sizes, "cpu"), options.steps)
    print(*table(found), sep="\n")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"step-parts-{options.rows}.json"
    path.write_text(json.dumps(setting | {"milliseconds": found}, indent=1) + "\n")


def measure(step: Step, products: Step, steps: int) -> dict[str, float]:
    """Median milliseconds of each part of a step, of the step and of the bare products."""
    watch, seconds = Watch(), defaultdict(list)
    with ExitStack() as stack:
        for where, name, part in PARTS:
            stack.enter_context(patch.object(where, name, watch.function(part, getattr(where, name))))
        for where, name, part in READS:
            stack.enter_context(patch.object(where, name, watch.generator(part, getattr(where, name))))
        for _ in range(steps + WARM):
            watch.begin()
            step()
            watch.enter(BARE)
            products()
            watch.enter(REST)
            taken = dict(watch.seconds)
            for part, value in (taken | {STEP: sum(taken.values()) - taken[BARE]}).items():
                seconds[part].append(value)
    return {part: round(1000 * statistics.median(values[WARM:]), 4) for part, values in seconds.items()}


def table(found: dict[str, float]) -> Iterator[str]:
    """A line a part, the largest first, then the step and the bare products."""
    parts = sorted(found, key=lambda part: (part == BARE, part == STEP, -found[part]))
    for part in parts:
        yield f"{part:<45}{found[part]:7.2f} ms {found[part] / found[BARE]:6.2f}"


if __name__ == "__main__":
    main()
