"""Contrastive losses of a batch against a queue: InfoNCE, SupCon and NT-Xent, the last two with a pair margin miner.

All use s = cos / T. Embeddings may have any length and any precision; sums and products are at least float32, under
autocast too. Gradient flows to the batch alone.

``implementation`` selects how the sums are computed. ``"blockwise"`` reads the queue in blocks of b rows, in memory of
O(B D + B b), and refuses a second derivative. ``"dense"`` makes a matrix [B, M]. ``"auto"`` is blockwise.

Axis legend: B anchors, M queue rows, D dimensions, E own rows of an anchor.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.losses import blockwise, dense
from selfsup_xbn.losses.pairs import PairMargin, Pairs
from selfsup_xbn.losses.sharded import AcrossShards
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.sharding import ShardedQueue

IMPLEMENTATIONS = {"auto": blockwise, "dense": dense, "blockwise": blockwise}


def info_nce(
    q: Float[Tensor, "B D"],
    k: Float[Tensor, "B D"],
    queue: FeatureQueue,
    temperature: float = 0.1,
    self_indices: Int64[Tensor, "B *E"] | None = None,
    *,
    implementation: str = "auto",
) -> Float[Tensor, ""]:
    """Return InfoNCE of queries and their keys, with the queue's rows r_j as negatives (MoCo, arXiv 1911.05722, Eq. 1).

    The mean over the batch of ``-log(exp(s_qk) / (exp(s_qk) + sum_j exp(s_qj)))``; 0 for an empty batch.

    Args:
        q: queries.
        k: keys; row i belongs to row i of the queries.
        queue: the memory of past keys.
        temperature: T > 0.
        self_indices: slots that a query does not meet, such as those of its own key; -1 for none.
        implementation: ``"auto"``, ``"dense"`` or ``"blockwise"``.

    Raises:
        UserError: a temperature that is not above 0 and finite, or an unknown implementation.
        ValueError: shapes that do not fit.

    Example:
        >>> queue = FeatureQueue(size=4, dim=2, adaptation="xbm")
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> slots = queue.enqueue(keys)
        >>> info_nce(keys, keys, queue, temperature=1.0, self_indices=slots)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    read = _checked(q, queue, temperature, implementation, k=k, self_indices=self_indices)
    with torch.autocast(q.device.type, enabled=False):
        query, key = _at_unit_length(q), _at_unit_length(k)
        sums = read.pair_sums(query, Pairs(queue, temperature, self_indices))
        gap = sums.logsumexp - (query * key).sum(1) / temperature
        # -log(exp(s_qk) / (exp(s_qk) + exp(logsumexp))) = log(1 + exp(gap))
        return F.softplus(gap, threshold=40).sum() / max(len(q), 1)


def sup_con(
    embeddings: Float[Tensor, "B D"],
    labels: Shaped[Tensor, "B"],
    queue: FeatureQueue | None = None,
    *,
    temperature: float = 0.1,
    miner: PairMargin | None = None,
    self_indices: Int64[Tensor, "B *E"] | None = None,
    implementation: str = "auto",
    on_pairs: Callable[[Tensor, Tensor], None] | None = None,
    sum_counts: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Return the supervised contrastive loss against the queue, or in the batch (arXiv 2004.11362, Eq. 2).

    For anchor i with positives P(i) and counted pairs A(i), positives among them::

        L_i = logsumexp_{a in A(i)} s_ia - mean_{p in P(i)} s_ip

    averaged over the anchors with L_i > 0; 0 if the batch has no negative pair. Value and gradient are those of PML's
    SupConLoss after a PairMarginMiner.

    Args:
        embeddings: the anchors.
        labels: class of each anchor, of any integer type.
        queue: a queue with labels; None: the batch without the anchor, always dense, with gradient to both sides.
        temperature: T > 0.
        miner: which pairs count; None for all.
        self_indices: slots that an anchor does not meet, such as its own; -1 for none.
        implementation: ``"auto"``, ``"dense"`` or ``"blockwise"``.
        on_pairs: called with the number of positive and of negative pairs, two tensors.
        sum_counts: returns the sum of an integer tensor over all processes, where each process has a part of the
            anchors. The result is then the part's share: the losses of all processes sum to the loss of all anchors.

    Raises:
        UserError: a temperature that is not above 0 and finite, an unknown implementation or miner distance.
        ValueError: shapes that do not fit, labels that are not whole numbers, or a queue without labels.

    Example:
        >>> embeddings, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> sup_con(embeddings, labels, temperature=1.0)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    read = _checked(embeddings, queue, temperature, implementation, labels=labels, self_indices=self_indices)
    if queue is None:
        read, self_indices = dense, torch.arange(len(labels), device=embeddings.device)
    with torch.autocast(embeddings.device.type, enabled=False):
        anchors = _at_unit_length(embeddings)
        sums = read.pair_sums(anchors, Pairs(queue, temperature, self_indices, labels, miner), include_positives=True)
        positives, negatives = sums.positives, sums.negatives
        losses = sums.logsumexp - (anchors * sums.positive_rows).sum(1) / positives.clamp(min=1) / temperature
        # An anchor with one pair has loss 0, which rounding can make positive; it is not averaged, as in PML.
        averaged = (losses > 0) & (positives > 0) & (positives + negatives > 1)
        if on_pairs is not None:
            on_pairs(positives.sum(), negatives.sum())
        counts = torch.stack([averaged.sum(), negatives.sum()])
        anchors_averaged, all_negatives = counts if sum_counts is None else sum_counts(counts)
        total = losses.where(averaged & (all_negatives > 0), 0.0).sum()
        return total / anchors_averaged.clamp(min=1)


def nt_xent(
    embeddings: Float[Tensor, "B D"],
    labels: Shaped[Tensor, "B"],
    queue: FeatureQueue,
    *,
    temperature: float = 0.07,
    miner: PairMargin | None = None,
    self_indices: Int64[Tensor, "B *E"] | None = None,
    implementation: str = "auto",
    on_pairs: Callable[[Tensor, Tensor], None] | None = None,
    sum_counts: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Return NT-Xent (arXiv 2002.05709, Eq. 1): each positive pair alone among its anchor's negatives.

    The mean over the counted positive pairs (i, p), with N(i) the counted negatives of anchor i, of::

        log(1 + exp(n_i - s_ip)),        n_i = logsumexp_{a in N(i)} s_ia

    and 0 if there is no positive pair. Value and gradient are those of PML's NTXentLoss, which makes a matrix of
    positive pairs x negative pairs.

    Args:
        embeddings: the anchors.
        labels: class of each anchor, of any integer type.
        queue: a queue with labels.
        temperature: T > 0.
        miner: which pairs count; None for all.
        self_indices: as in ``sup_con``.
        implementation: as in ``sup_con``.
        on_pairs: as in ``sup_con``.
        sum_counts: as in ``sup_con``.

    Raises:
        UserError, ValueError: as in ``sup_con``.

    Example:
        >>> queue = FeatureQueue(size=4, dim=2, adaptation="xbm", labels=True)
        >>> embeddings, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> slots = queue.enqueue(embeddings, labels)
        >>> nt_xent(embeddings, labels, queue, temperature=1.0, self_indices=slots)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    read = _checked(embeddings, queue, temperature, implementation, labels=labels, self_indices=self_indices)
    with torch.autocast(embeddings.device.type, enabled=False):
        anchors, pairs = _at_unit_length(embeddings), Pairs(queue, temperature, self_indices, labels, miner)
        sums = read.pair_sums(anchors, pairs)
        if on_pairs is not None:
            on_pairs(sums.positives.sum(), sums.negatives.sum())
        total: Tensor = read.positive_softplus(anchors, sums.logsumexp, pairs).sum()
        count = sums.positives.sum() if sum_counts is None else sum_counts(sums.positives.sum())
        return total / count.clamp(min=1)


def _at_unit_length(embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)


def _checked(
    embeddings: Tensor, queue: FeatureQueue | None, temperature: float, implementation: str, **beside: Tensor | None
) -> ModuleType | AcrossShards:
    """Return what makes the sums, over all shards of the queue; ``beside`` has a row for each embedding."""
    if not 0 < temperature < float("inf"):
        raise UserError(f"expected a temperature above 0, got {temperature}")
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"expected an implementation out of {list(IMPLEMENTATIONS)}, got {implementation!r}")
    if embeddings.ndim != 2 or (queue is not None and embeddings.shape[1] != queue.dim):
        raise ValueError(f"expected embeddings of shape [B, {queue.dim if queue else 'D'}], got {[*embeddings.shape]}")
    for name, rows in beside.items():
        if rows is not None and (len(rows) != len(embeddings) or (name == "k" and rows.shape != embeddings.shape)):
            raise ValueError(f"expected {name} for embeddings of shape {[*embeddings.shape]}, got {[*rows.shape]}")
    read = IMPLEMENTATIONS[implementation]
    return AcrossShards(read) if isinstance(queue, ShardedQueue) else read
