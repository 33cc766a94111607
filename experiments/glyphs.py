"""Compare memories on rendered characters (data set ``glyphs``), which need no download.

Recall@1 of supervised metric learning with batch sizes 16 and 64, and k-NN top-1 of MoCo with key momenta 0.9 and 0.99,
both among characters that training never saw.

    python -m experiments.glyphs --scale supervise --seeds 5     # 30 runs
    python -m experiments.glyphs --scale pretrain --seeds 5      # 20 runs
    python -m experiments.glyphs --scale supervise --from-results
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from experiments.retrieval import rows
from experiments.runs import Experiment, Result
from selfsup_xbn.config.modes import PretrainConfig, SuperviseConfig
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.report.comparison import comparison_lines, draw_comparison

SUPERVISE, PRETRAIN = cast(SuperviseConfig, RECIPES["glyphs"]), cast(PretrainConfig, RECIPES["glyphs-moco"])
SCALES: dict[str, dict[str, Any]] = {
    "supervise": {
        name: cell
        for batch in (64, 16)
        for name, cell in rows(
            replace(SUPERVISE, batch_size=batch), "no memory", "XBM", "XBN", label=f"{{}}, B {batch}"
        ).items()
    },
    "pretrain": {
        f"{name}, m {momentum}": replace(PRETRAIN, momentum=momentum, adaptation=name.lower())
        for momentum in (0.9, 0.99)
        for name in ("XBM", "XBN")
    },
}


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return the table of the results, and save a chart of the curves."""
    metric = "recall@1" if results[0]["config"]["mode"] == "supervise" else "knn_top1"
    draw_comparison(results, metric, path.with_suffix(".png"))
    return comparison_lines(results, metric)


if __name__ == "__main__":
    Experiment("glyphs", __doc__ or "", SCALES, show, scale="supervise").main()
