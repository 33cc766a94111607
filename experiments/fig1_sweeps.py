"""Measure Recall@1 against the batch size and against the queue size (Fig. 1 of arXiv 2303.17127).

In the paper, with a ResNet-50 on retrieval benchmarks, XBM degrades with small batches and does not benefit from a
large queue, in contrast to XBN. Paper scale: SOP, queue of 50 % for all batch sizes, batch 64 for all queue sizes.
Small scale: Omniglot as in ``experiments.omniglot``, 3 epochs at every batch size. 96 runs of two to three minutes took
two hours on two cores of a 2.1 GHz Xeon, with two runs of one thread in parallel. Runs of ``experiments.table2`` and
``table3`` are reused.

Recall@1 at small scale, 3 seeds (``results/fig1-small.json``, ``.png``)::

                  B 16           B 32           B 64           B 128
    no memory     65.74 +- 0.96  69.05 +- 0.85  69.69 +- 0.80  70.80 +- 0.33
    XBM           47.88 +- 1.23  53.68 +- 3.02  58.03 +- 6.17  61.76 +- 2.72
    XBM*          64.36 +- 0.48  68.26 +- 0.78  69.72 +- 0.38  69.26 +- 1.05
    XBN           67.36 +- 0.59  70.49 +- 0.06  71.64 +- 0.22  71.38 +- 0.23
    AXBN          67.81 +- 0.52  70.82 +- 1.01  71.90 +- 0.53  71.01 +- 0.07

                  M 10 %         M 25 %         M 50 %         M 100 %
    XBM           24.02 +- 7.43  46.32 +- 11.5  58.03 +- 6.17  57.80 +- 7.04
    XBM*          65.72 +- 0.98  67.08 +- 0.91  69.72 +- 0.38  69.58 +- 0.17
    XBN           68.54 +- 1.40  70.90 +- 0.70  71.64 +- 0.22  70.93 +- 0.35
    AXBN          68.49 +- 0.31  71.29 +- 0.90  71.90 +- 0.53  70.88 +- 0.53

As in the paper, XBM degrades with small batches and XBN does not, and neither improves much beyond M 50 %. Unlike in
the paper, XBM is worst with the smallest queue. At the end of these runs the distance between the means of queue and
batch was 1.2 standard deviations of the batch (``gap_mean_before``), compared with 0.4 at M 100 %. XBN with this queue
is one point below no memory.

    python -m experiments.fig1_sweeps --data omniglot=omniglot:FOLDER                # 32 cells x 3 seeds
    python -m experiments.fig1_sweeps --scale paper --data sop=sop:ROOT              # one GPU a run; not run
    python -m experiments.fig1_sweeps --from-results                                 # table and chart without training
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.pictures import Chart, save_chart, series
from experiments.retrieval import METHODS, recipe, rows
from experiments.runs import Experiment, Result
from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.report.comparison import averaged_over
from selfsup_xbn.runs.results import value_text

BATCHES, MEMORIES = (16, 32, 64, 128), (10, 25, 50, 100)
BATCH, MEMORY = 64, 50
LABEL = "{}, B {}, M {}%"


def sweeps(name: str) -> dict[str, SuperviseConfig]:
    """Return the cells of both sweeps. Cells without a queue differ in the batch size only."""
    cells: dict[str, SuperviseConfig] = {}
    for batch, memory in [(batch, MEMORY) for batch in BATCHES] + [(BATCH, memory) for memory in MEMORIES]:
        names = METHODS if memory == MEMORY else [method for method in METHODS if method != "no memory"]
        base = recipe(name, batch_size=batch, queue_size=f"{memory}%")
        cells |= rows(base, *names, label=LABEL.format("{}", batch, memory))
    return cells


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return two tables of Recall@1 with a row for each method, and save a chart of both sweeps."""
    cells = {result["label"]: result for result in results}
    by_batch = {name: [cells.get(LABEL.format(name, batch, MEMORY)) for batch in BATCHES] for name in METHODS}
    by_memory = {name: [cells.get(LABEL.format(name, BATCH, memory)) for memory in MEMORIES] for name in METHODS}
    by_memory["no memory"] = by_batch["no memory"][BATCHES.index(BATCH) :][:1] * len(MEMORIES)
    sides = (
        (f"memory of {MEMORY} % of the training images", "batch size [images]", BATCHES, by_batch),
        (f"batch size {BATCH}", "size of the memory [% of the training images]", MEMORIES, by_memory),
    )
    charts = [
        Chart(f"{title}{part}", x_label, "Recall@1 [%]", x, {name: series(by[name], "recall@1") for name in names})
        for part, names in {"": list(METHODS), ", without XBM": [name for name in METHODS if name != "XBM"]}.items()
        for title, x_label, x, by in sides
    ]
    title = f"{results[0]['config']['data']}: retrieval of unseen classes, {averaged_over(results)}"
    save_chart(path.with_suffix(".png"), title, charts, log=True, share_y=True)
    return [
        *_table("B", BATCHES, by_batch),
        "",
        *_table("M %", MEMORIES, by_memory),
    ]


def _table(name: str, columns: Sequence[int], by_method: dict[str, list[Result | None]]) -> list[str]:
    lines = [
        f"| Recall@1 | {' | '.join(f'{name} {column}' for column in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method, cells in by_method.items():
        shown = ["-" if cell is None else value_text(cell, "recall@1") for cell in cells]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return lines


SCALES = {"small": sweeps("omniglot"), "paper": sweeps("sop")}

if __name__ == "__main__":
    Experiment("fig1", __doc__ or "", SCALES, show).main()
