"""Fig. 1: Recall@1 against the batch size, and against the size of the memory (arXiv 2303.17127).

The paper sweeps both on its retrieval benchmarks with a ResNet-50: XBM falls apart with small batches and does not gain
from a large memory, XBN does neither. Paper scale: SOP, memory 50 % where the batch is swept, batch 64 where the
memory is. Small scale: Omniglot as in ``experiments.omniglot``, 3 epochs at every batch size.

    python -m experiments.fig1_sweeps --data omniglot=omniglot:FOLDER                # 32 cells x 3 seeds
    python -m experiments.fig1_sweeps --scale paper --data sop=sop:ROOT              # one GPU a run; not run here
    python -m experiments.fig1_sweeps --from-results                                 # table and picture, no training
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.pictures import save_chart, series
from experiments.retrieval import METHODS, recipe, rows
from experiments.runs import Experiment, Result, value_text
from selfsup_xbn.config import SuperviseConfig

BATCHES, MEMORIES = (16, 32, 64, 128), (10, 25, 50, 100)
BATCH, MEMORY = 64, 50
LABEL = "{}, B {}, M {}%"


def sweeps(name: str) -> dict[str, SuperviseConfig]:
    """Cells of both sweeps; the one that they share is there once, and no memory has no memory's size."""
    found: dict[str, SuperviseConfig] = {}
    for batch, memory in [(batch, MEMORY) for batch in BATCHES] + [(BATCH, memory) for memory in MEMORIES]:
        names = METHODS if memory == MEMORY else [method for method in METHODS if method != "no memory"]
        base = recipe(name, batch_size=batch, queue_size=f"{memory}%")
        found |= rows(base, *names, label=LABEL.format("{}", batch, memory))
    return found


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Two tables of Recall@1, a row a method; draws both sweeps beside the results."""
    cells = {result["label"]: result for result in results}
    by_batch = {name: [cells.get(LABEL.format(name, batch, MEMORY)) for batch in BATCHES] for name in METHODS}
    by_memory = {name: [cells.get(LABEL.format(name, BATCH, memory)) for memory in MEMORIES] for name in METHODS}
    by_memory["no memory"] = by_batch["no memory"][BATCHES.index(BATCH) :][:1] * len(MEMORIES)
    charts = [
        ("batch size", BATCHES, {name: series(found, "recall@1") for name, found in by_batch.items()}),
        ("memory, % of the training set", MEMORIES, {n: series(found, "recall@1") for n, found in by_memory.items()}),
    ]
    save_chart(path.with_suffix(".png"), charts, "Recall@1 [%]", log=True)
    return [
        *_table("B", BATCHES, by_batch),
        "",
        *_table("M %", MEMORIES, by_memory),
    ]


def _table(name: str, columns: Sequence[int], found: dict[str, list[Result | None]]) -> list[str]:
    lines = [
        f"| Recall@1 | {' | '.join(f'{name} {column}' for column in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method, cells in found.items():
        shown = ["-" if cell is None else value_text(cell, "recall@1") for cell in cells]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return lines


if __name__ == "__main__":
    Experiment("fig1", __doc__ or "", {"small": sweeps("omniglot"), "paper": sweeps("sop")}, show).main()
