"""Comparison of two finished runs: checkpoints and logs, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics


def differences(one: Path, other: Path) -> list[str]:
    """Return the names of the values that differ between two runs.

    All values of the checkpoints and of the log are compared, except times, the configuration, and the log's length.
    """
    names = [checkpoint.NAME, *([checkpoint.BEST] if (one / checkpoint.BEST).exists() else [])]
    paths = [f"{name}: {path}" for name in names for path in _different(_state(one, name), _state(other, name))]
    return paths + ["metrics"] * (_log(one) != _log(other))


def _state(folder: Path, name: str) -> dict[str, Any]:
    state = checkpoint.load(folder, name)
    state["meter"].pop("seconds")
    return {key: value for key, value in state.items() if key not in ("config", "log_bytes", "log_sha256")}


def _log(folder: Path) -> list[dict[str, Any]]:
    return [record | {"images_per_second": 0} for record in read_metrics(folder)]


def _different(one: Any, other: Any, name: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [path for key in one for path in _different(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [path for i in range(len(one)) for path in _different(one[i], other[i], f"{name}.{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    return [] if type(one) is type(other) and one == other else [name]
