"""Retrieval by cosine similarity: Recall@K, R-precision and MAP@R.

Axis legend: N queries, G gallery rows, D dimensions, B queries of one block, S gallery rows of the block's classes.

A query's matches are the gallery rows of its class, itself left out by index. The conventions of all functions here:

- Rows are normalised, so the order is that of the cosine (and of the Euclidean distance of unit vectors).
- Ties count against the query: a row of another class as similar as a match ranks before it. So an encoder that maps
  everything to one point scores 0, and duplicates give the same answer in any order.
- Queries without a match in the gallery (the only member of a class) are left out of the mean, as
  pytorch-metric-learning's AccuracyCalculator does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.neighbours import normalize_features, similarity_blocks, top_k


class _Ranking(NamedTuple):
    """Similarities of a block of queries, minus infinity where there is none, and the number of matches of each."""

    matches: Float32[Tensor, "B S"]
    others: Float32[Tensor, "B G"]
    relevant: Int64[Tensor, "B"]


@torch.no_grad()
def recall_at_k(
    queries: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
    gallery: Float[Tensor, "G D"] | None = None,
    gallery_labels: Int[Tensor, "G"] | None = None,
    ks: Sequence[int] = (1, 10),
) -> dict[int, float]:
    """Percentage of queries with at least one match among their K most similar gallery rows, for each K of ``ks``.

    Conventions in the module's docstring. Without a gallery the queries are searched among themselves. Memory beyond
    normalised copies of the features does not grow with N or G: no list of neighbours is made, since the rank of a
    query's best match is the number of rows of other classes that are at least as similar.

    Raises:
        UserError: features and labels that do not fit together, a feature that is not finite, no query with a match,
            or K < 1.
    """
    _check_ks(ks)
    blocks = _rankings(queries, labels, gallery, gallery_labels)
    return _recalls(torch.cat([_before_first_match(block) for block in blocks]), ks)


@torch.no_grad()
def retrieval_metrics(
    queries: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
    gallery: Float[Tensor, "G D"] | None = None,
    gallery_labels: Int[Tensor, "G"] | None = None,
    ks: Sequence[int] = (1, 10),
) -> dict[str, float]:
    """``recall@K`` for each K, ``r_precision`` and ``map@r``, in percent.

    With R the number of a query's matches, R-precision is the fraction of matches among the R most similar rows, and
    MAP@R the mean over the ranks i <= R of precision at i where rank i is a match, 0 elsewhere (Musgrave et al., "A
    Metric Learning Reality Check", 2020, section 3.1). Conventions and errors as for `recall_at_k`.
    """
    _check_ks(ks)
    before, precision, average = [], [], []
    for block in _rankings(queries, labels, gallery, gallery_labels):
        r_precision, map_at_r = _at_r(block)
        precision.append(r_precision)
        average.append(map_at_r)
        before.append(_before_first_match(block))
    recalls = {f"recall@{k}": recall for k, recall in _recalls(torch.cat(before), ks).items()}
    return recalls | {"r_precision": _percent(torch.cat(precision)), "map@r": _percent(torch.cat(average))}


def _rankings(
    queries: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None
) -> Iterator[_Ranking]:
    own_copies = int(gallery is None)
    gallery, gallery_labels = _gallery(queries, labels, gallery, gallery_labels)
    unit_gallery, gallery_labels = _sorted_by_class(gallery, gallery_labels, "gallery")
    if own_copies:
        unit_queries, labels = unit_gallery, gallery_labels
    else:
        unit_queries, labels = _sorted_by_class(queries, labels, "queries")
    first = torch.searchsorted(gallery_labels, labels)
    stop = torch.searchsorted(gallery_labels, labels, right=True)
    kept = (stop - first > own_copies).nonzero().flatten()
    if not len(kept):
        raise UserError("expected at least one query with a match in the gallery, got none; check the labels")
    if len(kept) < len(labels):
        unit_queries = unit_queries[kept]
    for rows, similarities in similarity_blocks(unit_queries, unit_gallery):
        own = kept[rows]
        if own_copies:
            similarities.scatter_(1, own[:, None], -torch.inf)
        yield _split(similarities, first[own], stop[own], stop[own] - first[own] - own_copies)


def _sorted_by_class(features: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Unit rows in the order of their labels: the matches of a block of queries then lie in a few columns."""
    labels, order = labels.to(features.device, torch.int64).sort()
    return normalize_features(features, name)[order], labels


def _split(similarities: Tensor, first: Tensor, stop: Tensor, relevant: Tensor) -> _Ranking:
    """Take the matches, columns [first, stop) of each row, out of ``similarities``."""
    low, high = int(first[0]), int(stop[-1])
    column = torch.arange(low, high, device=similarities.device)
    match = (column >= first[:, None]) & (column < stop[:, None])
    of_these_classes = similarities[:, low:high]
    matches = of_these_classes.masked_fill(~match, -torch.inf)
    of_these_classes.masked_fill_(match, -torch.inf)
    return _Ranking(matches, similarities, relevant)


def _gallery(
    queries: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gallery, or the queries in its place, checked against the queries."""
    if gallery is None or gallery_labels is None:
        if gallery is not None or gallery_labels is not None:
            raise UserError("expected both gallery and gallery_labels or neither, got only one of the two")
        gallery, gallery_labels = queries, labels
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
    """Rows of other classes that rank before a query's best match. Overwrites ``block.others``."""
    best = block.matches.amax(dim=1, keepdim=True)
    # 0/1 as floats in place, summed: exact up to 2^24, and several times faster than a sum of bools
    return block.others.ge_(best).sum(dim=1)


def _at_r(block: _Ranking) -> tuple[Tensor, Tensor]:
    """R-precision and average precision at R of each query."""
    relevant, most = block.relevant[:, None], int(block.relevant.max())
    matches = block.matches.topk(most, dim=1).values
    others = top_k(block.others, most).values.sort(dim=1, descending=True).values
    position = torch.arange(1, most + 1, device=matches.device)
    # negated for an ascending order; right: ties count against the query
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
