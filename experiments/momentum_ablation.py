"""Measure the k-NN accuracy of MoCo against the key momentum m, with a plain queue and with XBN.

This experiment is not in the paper. Small scale: the settings of ``experiments.fig2_moco``, whose runs at 0.99 are
reused. The runs at 0.9 and 0.999 are evaluated once, at the end. Paper scale: ResNet-18, 200 epochs.

k-NN top-1 at small scale, 3 seeds (``results/momentum_ablation-small.json``, ``.png``), three to eight minutes a run::

           m 0.9          m 0.99         m 0.999
    XBM    34.05 +- 1.32  46.74 +- 1.13  47.42 +- 0.59
    XBN    42.68 +- 0.85  48.46 +- 0.30  47.60 +- 0.34

The improvement by XBN is larger for keys that change faster.

    python -m experiments.momentum_ablation --data cifar10=folder:FOLDER
    python -m experiments.momentum_ablation --scale paper --data cifar10=cifar10:ROOT      # not run
    python -m experiments.momentum_ablation --from-results
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.fig2_moco import moco, small
from experiments.pictures import Chart, save_chart, series
from experiments.runs import Experiment, Result, table
from selfsup_xbn.report.comparison import averaged_over

AT_END: dict[str, Any] = {"eval_every": 0}
MOMENTA: dict[float, dict[str, Any]] = {0.9: AT_END, 0.99: {}, 0.999: AT_END}
NAMES = {"XBM": "xbm", "XBN": "xbn"}
COLUMNS = {"knn_top1": "k-NN top-1, projection", "knn_top1_backbone": "k-NN top-1, backbone", "loss": "loss"}
SCALES = {
    scale: {
        f"{name}, m {momentum}": base(adaptation=adaptation, momentum=momentum, **evaluated)
        for momentum, evaluated in MOMENTA.items()
        for name, adaptation in NAMES.items()
    }
    for scale, base in {"small": small, "paper": lambda **changes: moco("cifar10", **changes)}.items()
}


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return the table of the results, and save a chart of the accuracy against 1 - m."""
    cells = {result["label"]: result for result in results}
    lines = {name: series([cells.get(f"{name}, m {m}") for m in MOMENTA], "knn_top1") for name in NAMES}
    config, x_label = results[0]["config"], "1 - m, of the momentum m of the key encoder"
    chart = Chart("", x_label, "k-NN top-1 [%]", [round(1 - m, 3) for m in MOMENTA], lines)
    title = f"MoCo on {config['data']} with {config['backbone']}, {averaged_over(results)}"
    save_chart(path.with_suffix(".png"), title, [chart], log=True)
    return table(results, COLUMNS)


if __name__ == "__main__":
    Experiment("momentum_ablation", __doc__ or "", SCALES, show).main()
