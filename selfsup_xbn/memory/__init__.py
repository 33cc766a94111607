"""The memory of past embeddings, and the adaptations that keep it current (arXiv 2303.17127)."""

from __future__ import annotations

from selfsup_xbn.memory.adaptation import AXBN, XBM, XBN, Adaptation, make_adaptation
from selfsup_xbn.memory.feature_queue import Block, FeatureQueue
from selfsup_xbn.memory.moments import AdaptRecord, AffineMap, Moments, batch_moments

__all__ = [
    "AXBN",
    "XBM",
    "XBN",
    "AdaptRecord",
    "Adaptation",
    "AffineMap",
    "Block",
    "FeatureQueue",
    "Moments",
    "batch_moments",
    "make_adaptation",
]
