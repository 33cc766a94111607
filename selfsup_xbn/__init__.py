"""Contrastive and metric learning with a memory of past embeddings that is adapted by XBN or AXBN.

Names are imported at their first use. The command line can therefore print its help without importing torch, and
unused libraries are not loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsup_xbn.config.options import option
    from selfsup_xbn.config.registry import ADAPTATIONS, DATA_SETS, EVALUATORS, METHODS
    from selfsup_xbn.config.schema import Config
    from selfsup_xbn.data.base import ImageData, Split
    from selfsup_xbn.evaluation.evaluators import FeatureEvaluator
    from selfsup_xbn.evaluation.knn import knn_classify
    from selfsup_xbn.evaluation.retrieval import recall_at_k, retrieval_metrics
    from selfsup_xbn.evaluation.summary import METRICS, Metric
    from selfsup_xbn.integrations.lightly import MemoryBankModule, NNMemoryBankModule, NTXentLoss
    from selfsup_xbn.integrations.pytorch_metric_learning import CrossBatchMemory
    from selfsup_xbn.losses import PairMargin, info_nce, nt_xent, sup_con
    from selfsup_xbn.memory.adaptation import AXBN, XBM, XBN, Adaptation, Moments
    from selfsup_xbn.memory.feature_queue import FeatureQueue
    from selfsup_xbn.methods.base import Method, queue_from_config
    from selfsup_xbn.methods.metric_learning import MetricLearning
    from selfsup_xbn.methods.moco import MoCo
    from selfsup_xbn.models.encoder import Encoder, build_encoder

__version__ = "0.1.0"
__all__ = [
    "ADAPTATIONS",
    "AXBN",
    "DATA_SETS",
    "EVALUATORS",
    "METHODS",
    "METRICS",
    "XBM",
    "XBN",
    "Adaptation",
    "Config",
    "CrossBatchMemory",
    "Encoder",
    "FeatureEvaluator",
    "FeatureQueue",
    "ImageData",
    "MemoryBankModule",
    "Method",
    "Metric",
    "MetricLearning",
    "MoCo",
    "Moments",
    "NNMemoryBankModule",
    "NTXentLoss",
    "PairMargin",
    "Split",
    "build_encoder",
    "info_nce",
    "knn_classify",
    "nt_xent",
    "option",
    "queue_from_config",
    "recall_at_k",
    "retrieval_metrics",
    "sup_con",
]

_NAMES = {
    "config.options": ("option",),
    "config.registry": ("ADAPTATIONS", "DATA_SETS", "EVALUATORS", "METHODS"),
    "config.schema": ("Config",),
    "data.base": ("ImageData", "Split"),
    "evaluation.evaluators": ("FeatureEvaluator",),
    "evaluation.knn": ("knn_classify",),
    "evaluation.retrieval": ("recall_at_k", "retrieval_metrics"),
    "evaluation.summary": ("METRICS", "Metric"),
    "integrations.lightly": ("MemoryBankModule", "NNMemoryBankModule", "NTXentLoss"),
    "integrations.pytorch_metric_learning": ("CrossBatchMemory",),
    "losses": ("PairMargin", "info_nce", "nt_xent", "sup_con"),
    "memory.adaptation": ("AXBN", "XBM", "XBN", "Adaptation", "Moments"),
    "memory.feature_queue": ("FeatureQueue",),
    "methods.base": ("Method", "queue_from_config"),
    "methods.metric_learning": ("MetricLearning",),
    "methods.moco": ("MoCo",),
    "models.encoder": ("Encoder", "build_encoder"),
}
_MODULES = {name: f"selfsup_xbn.{module}" for module, names in _NAMES.items() for name in names}
_SUBPACKAGES = ("config", "data", "evaluation", "integrations", "losses", "memory", "methods", "models", "utils")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"selfsup_xbn.{name}")
    raise AttributeError(f"module 'selfsup_xbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_SUBPACKAGES})
