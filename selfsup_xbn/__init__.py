"""Contrastive and metric learning with a memory of past embeddings that is kept current by XBN and AXBN.

Names are imported when they are first used, so that the command line can answer before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsup_xbn.adaptation import AXBN, XBM, XBN
    from selfsup_xbn.compat.lightly import MemoryBankModule, NTXentLoss
    from selfsup_xbn.compat.pytorch_metric_learning import CrossBatchMemory
    from selfsup_xbn.feature_queue import FeatureQueue

__version__ = "0.1.0"
__all__ = ["AXBN", "XBM", "XBN", "CrossBatchMemory", "FeatureQueue", "MemoryBankModule", "NTXentLoss"]

_HOME = {
    "FeatureQueue": "selfsup_xbn.feature_queue",
    "XBM": "selfsup_xbn.adaptation",
    "XBN": "selfsup_xbn.adaptation",
    "AXBN": "selfsup_xbn.adaptation",
    "NTXentLoss": "selfsup_xbn.compat.lightly",
    "MemoryBankModule": "selfsup_xbn.compat.lightly",
    "CrossBatchMemory": "selfsup_xbn.compat.pytorch_metric_learning",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("evaluation", "losses", "compat", "data", "models", "methods"):
        return importlib.import_module(f"selfsup_xbn.{name}")
    raise AttributeError(f"module 'selfsup_xbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
