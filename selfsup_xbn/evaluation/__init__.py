"""Evaluation of frozen features: k-NN accuracy, retrieval metrics and feature drift during training.

The metrics are pure functions of features and labels. The caller computes the features, on one device or gathered from
several.
"""

from __future__ import annotations

from selfsup_xbn.evaluation.drift import Drift, FeatureDrift, MomentGap, moment_gap
from selfsup_xbn.evaluation.features import extract_features
from selfsup_xbn.evaluation.knn import knn_classify
from selfsup_xbn.evaluation.retrieval import recall_at_k, retrieval_metrics

__all__ = [
    "Drift",
    "FeatureDrift",
    "MomentGap",
    "extract_features",
    "knn_classify",
    "moment_gap",
    "recall_at_k",
    "retrieval_metrics",
]
