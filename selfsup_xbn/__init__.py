"""Contrastive and metric learning with a memory of past embeddings that is kept current by XBN and AXBN.

Names are imported when they are first used, so that the command line can answer before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsup_xbn.integrations.lightly import MemoryBankModule, NTXentLoss
    from selfsup_xbn.integrations.pytorch_metric_learning import CrossBatchMemory
    from selfsup_xbn.memory.adaptation import AXBN, XBM, XBN
    from selfsup_xbn.memory.feature_queue import FeatureQueue

__version__ = "0.1.0"
__all__ = ["AXBN", "XBM", "XBN", "CrossBatchMemory", "FeatureQueue", "MemoryBankModule", "NTXentLoss"]

_HOME = {
    "FeatureQueue": "selfsup_xbn.memory.feature_queue",
    "XBM": "selfsup_xbn.memory.adaptation",
    "XBN": "selfsup_xbn.memory.adaptation",
    "AXBN": "selfsup_xbn.memory.adaptation",
    "NTXentLoss": "selfsup_xbn.integrations.lightly",
    "MemoryBankModule": "selfsup_xbn.integrations.lightly",
    "CrossBatchMemory": "selfsup_xbn.integrations.pytorch_metric_learning",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("evaluation", "losses", "integrations", "data", "models", "methods", "memory"):
        return importlib.import_module(f"selfsup_xbn.{name}")
    raise AttributeError(f"module 'selfsup_xbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
