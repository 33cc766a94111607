"""Configs of the retrieval experiments: the rows of the tables as changes of a base config."""

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
    """Return a supervised recipe with changes. By default it is evaluated once, at the end of the run."""
    return replace(cast(SuperviseConfig, RECIPES[name]), **{"eval_every": 0} | changes)


def rows(base: SuperviseConfig, *names: str, label: str = "{}") -> dict[str, SuperviseConfig]:
    """Return the cells of the named methods, by default of all. ``label`` is a format string for the method."""
    return {label.format(name): replace(base, **METHODS[name]) for name in names or METHODS}
