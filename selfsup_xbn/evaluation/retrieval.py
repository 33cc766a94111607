"""Retrieval by cosine similarity: Recall@K, R-precision and MAP@R.

Axis legend: N queries, G gallery rows, D dimensions, B queries of one block, S gallery rows of the block's classes.

The matches of a query are the gallery rows of its class, without the query itself: without a gallery the queries are
ranked against each other, and ``self_indices`` names the query's own row in a gallery that includes the queries.
Conventions of all functions:

- Rows are ranked by cosine similarity or, equivalently, by the Euclidean distance of unit vectors.
- A row of another class that is as similar as a match ranks before the match. An encoder that maps all images to one
  point thus scores 0, and the order of duplicates does not affect the metrics.
- Queries without a match in the gallery are ignored, as in the ``AccuracyCalculator`` of pytorch-metric-learning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Int64, Shaped
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.neighbors import normalize_features, similarity_blocks, top_k
from selfsup_xbn.utils.checks import check_tensors
from selfsup_xbn.utils.labels import class_indices


class _Ranking(NamedTuple):
    """Similarities of a block of queries.

    Attributes:
        matches: The similarities of the matches, and minus infinity for other rows.
        others: The similarities of the rows of other classes, and minus infinity for the matches and the query itself.
        relevant: The number of matches of each query.
    """

    matches: Float32[Tensor, "B S"]
    others: Float32[Tensor, "B G"]
    relevant: Int64[Tensor, "B"]


@torch.no_grad()
def recall_at_k(
    queries: Float[Tensor, "N D"],
    labels: Shaped[Tensor, "N"],
    gallery: Float[Tensor, "G D"] | None = None,
    gallery_labels: Shaped[Tensor, "G"] | None = None,
    ks: Sequence[int] = (1, 10),
    *,
    self_indices: Int[Tensor, "N"] | None = None,
) -> dict[int, float]:
    """Return the percentage of queries with at least one match among their K most similar gallery rows.

    The docstring of this module lists the conventions. No lists of neighbors are needed, because the rank of a query's
    best match follows from the number of rows of other classes that are at least as similar. Apart from normalized
    copies of the features, the memory does not grow with N or G.

    Args:
        queries: The features of the queries, of any length.
        labels: The class of each query, whole numbers of any dtype.
        gallery: The features to retrieve from, of any length. ``None`` to rank the queries against each other.
        gallery_labels: The class of each gallery row; required with ``gallery``.
        ks: The values of K.
        self_indices: The row of each query itself in the gallery, which is left out; -1 for none.

    Returns:
        The recall in percent for each K.

    Raises:
        UserError: If the shapes do not match, a feature is not finite, no query has a match, or a K is less than 1.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> recall_at_k(features, torch.tensor([0, 0, 1, 1]), ks=(1,))
        {1: 100.0}
    """
    _check_ks(ks)
    blocks = _rankings(queries, labels, gallery, gallery_labels, self_indices)
    return _recalls(torch.cat([_before_first_match(block) for block in blocks]), ks)


@torch.no_grad()
def retrieval_metrics(
    queries: Float[Tensor, "N D"],
    labels: Shaped[Tensor, "N"],
    gallery: Float[Tensor, "G D"] | None = None,
    gallery_labels: Shaped[Tensor, "G"] | None = None,
    ks: Sequence[int] = (1, 10),
    *,
    self_indices: Int[Tensor, "N"] | None = None,
) -> dict[str, float]:
    """Return Recall@K, R-precision and MAP@R in percent.

    Let R be the number of matches of a query. R-precision is the fraction of matches among the R most similar rows.
    MAP@R is the sum of the precision at the ranks i <= R of matches, divided by R (Musgrave et al., "A Metric Learning
    Reality Check", 2020, section 3.1). The docstring of this module lists the conventions.

    Args:
        queries: The features of the queries, of any length.
        labels: The class of each query, whole numbers of any dtype.
        gallery: The features to retrieve from, of any length. ``None`` to rank the queries against each other.
        gallery_labels: The class of each gallery row; required with ``gallery``.
        ks: The values of K.
        self_indices: The row of each query itself in the gallery, which is left out; -1 for none.

    Returns:
        The values of ``recall@K`` for each K, ``r_precision`` and ``map@r``.

    Raises:
        UserError: If the shapes do not match, a feature is not finite, no query has a match, or a K is less than 1.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> retrieval_metrics(features, torch.tensor([0, 0, 1, 1]), ks=(1,))
        {'recall@1': 100.0, 'r_precision': 100.0, 'map@r': 100.0}
    """
    _check_ks(ks)
    before, precision, average = [], [], []
    for block in _rankings(queries, labels, gallery, gallery_labels, self_indices):
        r_precision, map_at_r = _at_r(block)
        precision.append(r_precision)
        average.append(map_at_r)
        before.append(_before_first_match(block))
    recalls = {f"recall@{k}": recall for k, recall in _recalls(torch.cat(before), ks).items()}
    return recalls | {"r_precision": _percent(torch.cat(precision)), "map@r": _percent(torch.cat(average))}


def _rankings(
    queries: Tensor,
    labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
    self_indices: Tensor | None,
) -> Iterator[_Ranking]:
    if gallery is None and self_indices is not None:
        raise UserError("expected a gallery with self_indices: without one each query is left out of its own ranking")
    within = gallery is None
    gallery, gallery_labels = _checked_gallery(queries, labels, gallery, gallery_labels)
    labels, gallery_labels = class_indices(labels, len(queries)), class_indices(gallery_labels, len(gallery))
    own = torch.full((len(queries),), -1) if self_indices is None else self_indices.long()
    if own.shape != queries.shape[:1] or (len(own) and not -1 <= int(own.min()) <= int(own.max()) < len(gallery)):
        raise UserError(
            f"expected self_indices of shape [{len(queries)}] in [-1, {len(gallery)}), got {[*own.shape]} "
            f"from {own.min().item()} to {own.max().item()}"
        )
    unit_gallery, gallery_labels, order = _sorted_by_class(gallery, gallery_labels, "gallery")
    column = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    if within:
        unit_queries, labels, own = unit_gallery, gallery_labels, torch.arange(len(order), device=order.device)
    else:
        unit_queries, labels, query_order = _sorted_by_class(queries, labels, "queries")
        own = own.to(order.device)[query_order]
        own = torch.where(own < 0, -1, column[own])
    first = torch.searchsorted(gallery_labels, labels)
    stop = torch.searchsorted(gallery_labels, labels, right=True)
    self_matches = ((own >= first) & (own < stop)).long()
    matched = (stop - first > self_matches).nonzero().flatten()
    if not len(matched):
        raise UserError("expected at least one query with a match in the gallery, got none; check the labels")
    if len(matched) < len(labels):
        unit_queries = unit_queries[matched]
    for rows, similarities in similarity_blocks(unit_queries, unit_gallery):
        index = matched[rows]
        if within or self_indices is not None:
            left_out = own[index, None]
            kept = similarities.gather(1, left_out.clamp(min=0))
            similarities.scatter_(1, left_out.clamp(min=0), kept.masked_fill(left_out >= 0, -torch.inf))
        yield _split(similarities, first[index], stop[index], (stop - first - self_matches)[index])


def _sorted_by_class(features: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit rows and labels sorted by label, and their order.

    The matches of a block of queries are then in few columns.
    """
    labels, order = labels.to(features.device).sort()
    return normalize_features(features, name)[order], labels, order


def _split(similarities: Tensor, first: Tensor, stop: Tensor, relevant: Tensor) -> _Ranking:
    """Move the matches, columns [first, stop) of each row, from ``similarities`` to another tensor."""
    low, high = int(first[0]), int(stop[-1])
    column = torch.arange(low, high, device=similarities.device)
    match = (column >= first[:, None]) & (column < stop[:, None])
    same_classes = similarities[:, low:high]
    matches = same_classes.masked_fill(~match, -torch.inf)
    same_classes.masked_fill_(match, -torch.inf)
    return _Ranking(matches, similarities, relevant)


def _checked_gallery(
    queries: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gallery, or else the queries, and check it against the queries."""
    check_tensors(queries=queries, labels=labels, gallery=gallery, gallery_labels=gallery_labels)
    if gallery is None or gallery_labels is None:
        if gallery is not None or gallery_labels is not None:
            raise UserError("expected both gallery and gallery_labels or neither, got only one of the two")
        gallery, gallery_labels = queries, labels
    for name, rows in (("queries", queries), ("gallery", gallery)):
        if rows.ndim != 2:
            raise UserError(f"{name}: expected features of shape [rows, dimensions], got {[*rows.shape]}")
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"expected queries and gallery with the same number of dimensions, got {queries.shape[1]} and "
            f"{gallery.shape[1]}; compute both with the same encoder"
        )
    for name, rows, classes in (("query", queries, labels), ("gallery row", gallery, gallery_labels)):
        if len(rows) != len(classes):
            raise UserError(f"expected one label per {name}, got {len(classes)} labels for {len(rows)} rows")
    return gallery, gallery_labels


def _before_first_match(block: _Ranking) -> Float32[Tensor, "B"]:
    """Return the number of rows of other classes that rank before the best match. Overwrites ``block.others``."""
    best = block.matches.amax(dim=1, keepdim=True)
    # An in-place comparison gives floats 0 and 1. Their sum is exact up to 2^24 and much faster than that of bools.
    return block.others.ge_(best).sum(dim=1)


def _at_r(block: _Ranking) -> tuple[Tensor, Tensor]:
    """Return R-precision and average precision at R of each query."""
    relevant, max_relevant = block.relevant[:, None], int(block.relevant.max())
    matches = block.matches.topk(max_relevant, dim=1).values
    others = top_k(block.others, max_relevant).values.sort(dim=1, descending=True).values
    position = torch.arange(1, max_relevant + 1, device=matches.device)
    # The negation gives the ascending order that searchsorted needs. With right=True, ties rank before the match.
    rank = position + torch.searchsorted(-others, -matches, right=True)
    hit = (rank <= relevant).double()
    return hit.sum(1) / block.relevant, (hit * position / rank).sum(1) / block.relevant


def _recalls(before: Tensor, ks: Sequence[int]) -> dict[int, float]:
    return {k: _percent(before < k) for k in ks}


def _percent(values: Tensor) -> float:
    return 100 * float(values.double().mean())


def _check_ks(ks: Sequence[int]) -> None:
    if any(k < 1 for k in ks):
        raise UserError(f"expected every K to be at least 1, got {list(ks)}")
