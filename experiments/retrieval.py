"""Rows and columns of the retrieval tables: the rows are changes of a base config."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from experiments.runs import Result, table
from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.config.recipes import RECIPES

METHODS: dict[str, dict[str, Any]] = {
    "no memory": {"queue_size": "0"},
    "XBM": {"adaptation": "xbm"},
    "XBM*": {"adaptation": "xbm", "batch_loss_weight": 1.0},
    "XBN": {"adaptation": "xbn"},
    "AXBN": {"adaptation": "axbn"},
}
TABLE1 = ("no memory", "XBM", "XBN", "AXBN")
"""Methods of Table 1. Table 2 adds XBM* and no memory at batch 512."""

COLUMNS = {"recall@1": "Recall@1", "recall@10": "Recall@10", "r_precision": "R-precision", "map@r": "MAP@R"}


def recipe(name: str, **changes: Any) -> SuperviseConfig:
    """Return a supervised recipe with changes. By default it is evaluated once, at the end of the run."""
    return replace(cast(SuperviseConfig, RECIPES[name]), **{"eval_every": 0} | changes)


def rows(base: SuperviseConfig, *names: str, label: str = "{}") -> dict[str, SuperviseConfig]:
    """Return the cells of the named methods, by default of all. ``label`` is a format string for the method."""
    return {label.format(name): replace(base, **METHODS[name]) for name in names or METHODS}


def table2_rows(base: SuperviseConfig, label: str = "{}", large_batch: int = 512) -> dict[str, SuperviseConfig]:
    """Return the cells of all methods, and of no memory with a larger batch."""
    large = rows(replace(base, batch_size=large_batch), "no memory", label=f"{label}, B {large_batch}")
    return rows(base, "no memory", label=label) | large | rows(base, *list(METHODS)[1:], label=label)


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return the table of the results and the standard deviation of a run."""
    return [*table(results, COLUMNS), *spread(results)]


def spread(results: list[Result]) -> Iterator[str]:
    """Yield the standard deviation of Recall@1, pooled over all rows except XBM, whose deviation is much larger."""
    rows = [result["seeds"].values() for result in results if not result["label"].endswith(": XBM")]
    values = [[final["recall@1"] for final in seeds] for seeds in rows if len(seeds) > 1]
    if values:
        squares = sum((len(recalls) - 1) * statistics.variance(recalls) for recalls in values)
        pooled = math.sqrt(squares / sum(len(recalls) - 1 for recalls in values))
        yield f"Standard deviation of Recall@1, pooled over all rows except XBM: {pooled:.2f}"
