"""What the retrieval experiments have in common: the rows of the paper's tables, each a change of one base config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.config.schema import SuperviseConfig

METHODS: dict[str, dict[str, Any]] = {
    "no memory": {"queue_size": "0"},
    "XBM": {"adaptation": "xbm"},
    "XBM*": {"adaptation": "xbm", "batch_loss_weight": 1.0},
    "XBN": {"adaptation": "xbn"},
    "AXBN": {"adaptation": "axbn"},
}


def recipe(name: str, **changes: Any) -> SuperviseConfig:
    """A supervised recipe, evaluated at the end alone unless ``changes`` say otherwise."""
    return replace(cast(SuperviseConfig, RECIPES[name]), **{"eval_every": 0} | changes)


def rows(base: SuperviseConfig, *names: str, label: str = "{}") -> dict[str, SuperviseConfig]:
    """Cells of the named methods (all of them by default), labelled by the pattern."""
    return {label.format(name): replace(base, **METHODS[name]) for name in names or METHODS}
