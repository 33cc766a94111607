"""Compare MoCo with a plain queue and with XBN by weighted k-NN after every epoch (Fig. 2 of arXiv 2303.17127).

Paper scale: the settings of pytorch-metric-learning's MoCo notebook at batch 128, ResNet-18 with a stem for 32 x 32,
200 epochs, CIFAR-10 and CIFAR-100. The paper reports XBN about 4 points ahead at epoch 15, and the notebook 82.9 % at
epoch 200 with batch 256. Small scale: CIFAR-10, 10,000 training images, a four-layer convnet, 8 epochs. A run takes
four to seven minutes with two runs in parallel on two cores of a 2.1 GHz Xeon.

k-NN top-1 at small scale, 3 seeds (``results/fig2-small.json``, ``.png``)::

           epoch 1        epoch 2        epoch 4        epoch 6        epoch 8
    XBM    38.82 +- 0.95  41.13 +- 1.22  43.92 +- 0.65  45.93 +- 1.05  46.74 +- 1.13
    XBN    38.89 +- 0.07  41.68 +- 0.96  44.15 +- 0.46  47.07 +- 0.52  48.46 +- 0.30

k-NN top-1 at paper scale, 3 seeds, the first 30 (CIFAR-10) and 20 (CIFAR-100) of 200 epochs
(``results/fig2-paper.json``, ``.png``), on one NVIDIA H200 with six runs in parallel in eight and five minutes
(``--compile``, CUDA graph, bfloat16, torch 2.11)::

    CIFAR-10   epoch 1        epoch 3        epoch 5        epoch 10       epoch 15       epoch 20       epoch 30
    XBM        43.53 +- 0.58  49.11 +- 1.45  54.68 +- 1.09  63.71 +- 0.06  67.99 +- 0.59  70.13 +- 0.38  72.43 +- 0.57
    XBN        44.69 +- 1.02  52.61 +- 0.17  57.27 +- 0.07  64.83 +- 0.27  68.71 +- 0.50  70.06 +- 0.27  72.56 +- 0.47
    CIFAR-100
    XBM        15.90 +- 0.21  21.47 +- 0.26  26.09 +- 0.49  33.55 +- 0.25  37.89 +- 0.47  40.01 +- 0.32
    XBN        17.86 +- 0.63  25.97 +- 0.23  29.83 +- 0.68  35.14 +- 0.19  38.96 +- 0.49  40.42 +- 0.39

XBN is up to 3.5 (CIFAR-10) and 4.5 points (CIFAR-100) better in the first epochs, in which the keys change fast. The
difference is 0.7 and 1.1 points at epoch 15, compared with about 4 in the paper, and below 1 from epoch 16 on.

Choices that the paper leaves open, one seed, the first 11 of 200 epochs (``results/fig2-variants.json``, ``.png``), on
one NVIDIA H100 with six runs in parallel::

                                                        epoch 1  epoch 3  epoch 5  epoch 10  epoch 11
    XBN, keys matched before normalization              44.95    52.64    56.67    64.44     64.49
    XBN, the same, keys enqueued after the loss         45.07    51.68    56.90    63.95     64.78
    XBM, keys enqueued after the loss                   41.44    46.47    51.06    62.68     64.16
    XBN, keys enqueued after the loss                   45.72    53.06    57.30    64.88     65.46
    XBM, BatchNorm of the whole batch (to epoch 15)     44.25    50.53    55.79    64.52     65.33
    XBN, BatchNorm of the whole batch (to epoch 14)     46.02    52.98    57.31    64.95     65.70

With the keys enqueued after the loss, as in MoCo, XBN is 6 points better at epoch 5 and 1.3 at epoch 11. No choice
leads to 4 points at epoch 15.

    python -m experiments.fig2_moco --data cifar10=folder:FOLDER
    python -m experiments.fig2_moco --scale paper --only cifar10: --jobs 6 --data cifar10=cifar10:ROOT      # one GPU
    python -m experiments.fig2_moco --from-results

On a GPU with a time limit, for example of 25 minutes, repeat the first command with the same ``--folder``: runs resume
from their last checkpoint. ``--collect`` adds the logs of unfinished runs to the results::

    timeout 1450 python -m experiments.fig2_moco --scale paper --only cifar10: --jobs 6 --seeds 3 --folder FOLDER ...
    python -m experiments.fig2_moco --scale paper --only cifar10: --folder FOLDER --collect
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from experiments.pictures import Chart, courses, save_chart
from experiments.runs import Experiment, Result
from selfsup_xbn.config.modes import PretrainConfig
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.report.comparison import averaged_over
from selfsup_xbn.runs.results import course

ADAPTATIONS = {"XBM": "xbm", "XBN": "xbn", "AXBN": "axbn"}
EPOCHS = {"small": (1, 2, 4, 6, 8), "paper": (1, 3, 5, 10, 15, 20, 30)}


def moco(name: str, **changes: Any) -> PretrainConfig:
    """Return the config of the figure for the data set ``name``."""
    return replace(cast(PretrainConfig, RECIPES[f"{name}-fig2"]), **changes)


def small(**changes: Any) -> PretrainConfig:
    """Return the config for CIFAR-10 at small scale."""
    return moco("cifar10", backbone="convnet4", limit_train=10_000, epochs=8, **changes)


# The choices that the paper leaves open. The default: unit keys are matched, enqueued before the loss, 8 splits.
VARIANTS: dict[str, dict[str, Any]] = {
    "keys matched before normalization": {"normalize_first": False},
    "keys matched before normalization, enqueue after the loss": {"normalize_first": False, "enqueue": "after_loss"},
    "enqueue after the loss": {"enqueue": "after_loss"},
    "BatchNorm of the whole batch": {"bn_splits": 1},
}
SCALES = {
    "small": {name: small(adaptation=ADAPTATIONS[name]) for name in ("XBM", "XBN")},
    "paper": {
        f"{data}: {name}": moco(data, adaptation=adaptation, eval_every=1)
        for data in ("cifar10", "cifar100")
        for name, adaptation in ADAPTATIONS.items()
    },
    "variants": {
        f"{name}, {variant}": moco("cifar10", adaptation=ADAPTATIONS[name], eval_every=1, **changes)
        for variant, changes in VARIANTS.items()
        for name in ("XBM", "XBN")
        if name == "XBN" or "normalize_first" not in changes  # XBM matches nothing
    },
}


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return a table of k-NN top-1 at some epochs, and save a chart of the curves for each data set."""
    charts = []
    for name in dict.fromkeys(result["config"]["data"] for result in results):
        cells = {r["label"].removeprefix(f"{name}: "): r for r in results if r["config"]["data"] == name}
        charts.append(Chart(name, "epoch", "k-NN top-1 [%]", *courses(cells, "knn_top1")))
    title = f"MoCo with {results[0]['config']['backbone']}, {averaged_over(results)}"
    columns = 1 if "variants" in path.stem else 5
    save_chart(path.with_suffix(".png"), title, charts, legend_columns=columns)
    return _table(results, EPOCHS["small" if "small" in path.stem else "paper"])


def _table(results: list[Result], columns: Sequence[int]) -> list[str]:
    lines = [f"| k-NN top-1 | {' | '.join(f'epoch {c}' for c in columns)} | seeds |", "|---" * (len(columns) + 2) + "|"]
    for result in results:
        epochs, means, deviations = course(result, "knn_top1")
        several = len(result["seeds"]) > 1
        at = {
            epoch: f"{m:.2f}" + f" ± {s:.2f}" * several for epoch, m, s in zip(epochs, means, deviations, strict=True)
        }
        shown = " | ".join(at.get(column, "-") for column in columns)
        lines.append(f"| {result['label']} | {shown} | {len(result['seeds'])} |")
    return lines


if __name__ == "__main__":
    Experiment("fig2", __doc__ or "", SCALES, show).main()
