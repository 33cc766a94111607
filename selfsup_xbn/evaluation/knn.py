"""Weighted k-nearest-neighbor classification of frozen features.

Axis legend: N queries, G bank rows, D dimensions, C classes.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.neighbors import normalize_features, similarity_blocks, top_k
from selfsup_xbn.utils.checks import check_tensors
from selfsup_xbn.utils.labels import class_indices


@torch.no_grad()
def knn_classify(
    queries: Float[Tensor, "N D"],
    bank: Float[Tensor, "G D"],
    labels: Shaped[Tensor, "G"],
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
    exclude_self: bool = False,
) -> Int64[Tensor, "N"]:
    """Classify each query by a weighted vote of its ``k`` nearest neighbors in a bank.

    A neighbor with cosine similarity s has weight exp(s / temperature) (Wu et al., "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", 2018, section 3.4). Among classes with equal votes, the lowest is
    predicted. The features are normalized here. Apart from the normalized copies, the memory does not grow with N or G.

    Args:
        queries: The features to classify, of any length.
        bank: The labeled features, of any length and on the same device.
        labels: The class of each bank row, a whole number in [0, num_classes).
        num_classes: The number of classes C.
        k: The number of neighbors. If the bank has fewer, all of them are used, with a warning.
        temperature: The temperature of the weights, in units of cosine similarity.
        exclude_self: Whether ``queries`` is the bank and each row is excluded from its own neighbors.

    Returns:
        The predicted class of each query.

    Raises:
        UserError: If the shapes do not match, a feature is not finite, a label is not in [0, num_classes), k < 1, or
            temperature <= 0.

    Example:
        >>> bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> knn_classify(torch.tensor([[0.1, 0.9, 0.2]]), bank, labels, num_classes=3, k=1)
        tensor([1])
    """
    labels = _checked(queries, bank, labels, num_classes, k, temperature, exclude_self)
    k = _clamp(k, len(bank) - exclude_self)
    queries, bank, labels = (
        normalize_features(queries, "queries"),
        normalize_features(bank, "bank"),
        labels.to(bank.device),
    )
    predicted = labels.new_empty(len(queries))
    for rows, similarities in similarity_blocks(queries, bank):
        if exclude_self:
            similarities.diagonal(rows.start).fill_(-torch.inf)
        nearest = top_k(similarities, k)
        # The softmax divides the weights of a query by a constant, which does not change the vote, and avoids overflow.
        weights = (nearest.values / temperature).softmax(dim=1)
        votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels[nearest.columns], weights)
        predicted[rows] = votes.argmax(dim=1)
    return predicted


def _checked(
    queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float, exclude_self: bool
) -> Int64[Tensor, "G"]:
    """Check the arguments and return the labels as int64."""
    check_tensors(queries=queries, bank=bank, labels=labels)
    if queries.ndim != 2 or bank.ndim != 2:
        raise UserError(f"expected queries [N, D] and a bank [G, D], got {[*queries.shape]} and {[*bank.shape]}")
    if queries.shape[1] != bank.shape[1]:
        raise UserError(
            f"expected queries and bank with the same number of dimensions, got {queries.shape[1]} and "
            f"{bank.shape[1]}; compute both with the same encoder"
        )
    if len(labels) != len(bank):
        raise UserError(f"expected one label per bank row, got {len(labels)} labels for {len(bank)} rows")
    if exclude_self and len(queries) != len(bank):
        raise UserError(
            f"expected the bank as queries with exclude_self, got {len(queries)} queries and {len(bank)} bank rows"
        )
    if len(bank) <= exclude_self:
        raise UserError(f"expected at least {1 + exclude_self} bank rows, got {len(bank)}")
    labels = class_indices(labels, len(bank))
    if not 0 <= (low := int(labels.min())) <= (high := int(labels.max())) < num_classes:
        raise UserError(f"expected labels in [0, {num_classes}), got {low if low < 0 else high}")
    if k < 1 or not 0 < temperature < float("inf"):
        raise UserError(f"expected k >= 1 and temperature > 0, got k={k} and temperature={temperature}")
    return labels


def _clamp(k: int, neighbors: int) -> int:
    if k > neighbors:
        warnings.warn(f"k={k} exceeds the {neighbors} neighbors in the bank; using k={neighbors}", stacklevel=3)
    return min(k, neighbors)
