"""Contrastive losses of a batch against a queue: InfoNCE, SupCon and NT-Xent, the last two with a pair margin miner.

All use s = cos / T. Embeddings may have any length and any precision; sums and products are at least float32, under
autocast too. Gradient flows to the batch alone, and to T if it is a tensor. An anchor of zeros has similarity 0 with
every row, and gradient 0. So has a row of zeros in a plain queue; XBN and AXBN move it as any other row. A batch with a
value that is not finite has the loss NaN. A batch without anchors has the loss 0.

``implementation`` selects how the sums are computed. ``"blockwise"`` reads the queue in blocks of b rows, in memory of
O(B D + B b), and refuses a second derivative. ``"dense"`` makes a matrix [B, M]. ``"triton"`` runs InfoNCE and SupCon
with a queue as GPU kernels, in memory of O(B D) for each multiprocessor, and refuses a second derivative; SupCon keeps
logits too: those of 64 anchors, or of more while they are at most 2**24. ``"auto"`` is triton on a GPU of compute
capability 8.0 or higher, if Triton is installed and takes the sizes and dtypes, and blockwise elsewhere and in compiled
code; it is dense if T is a tensor. A sharded queue, and SupCon of anchors that several processes share out, are
blockwise on a GPU too, as is the moment gradient (``adapted_to``).

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
from selfsup_xbn.memory.device import has_kernels, has_triton
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.sharding import ShardedQueue
from selfsup_xbn.utils.checks import check_tensors

IMPLEMENTATIONS = ("auto", "dense", "blockwise", "triton")
_SUMS = {"dense": dense, "blockwise": blockwise}


def info_nce(
    q: Float[Tensor, "B D"],
    k: Float[Tensor, "B D"],
    queue: FeatureQueue,
    temperature: float | Tensor = 0.1,
    self_indices: Int64[Tensor, "B *E"] | None = None,
    *,
    implementation: str = "auto",
    adapted_to: Float[Tensor, "N D"] | None = None,
) -> Float[Tensor, ""]:
    """Return InfoNCE of queries and their keys, with the queue's rows r_j as negatives (MoCo, arXiv 1911.05722, Eq. 1).

    The mean over the batch of ``-log(exp(s_qk) / (exp(s_qk) + sum_j exp(s_qj)))``. Against an empty queue it is 0, with
    gradient 0: enqueue the keys first, or fill the queue with other rows.

    Args:
        q: queries.
        k: keys; row i belongs to row i of the queries.
        queue: the memory of past keys.
        temperature: T > 0, a number or, to learn it, a tensor of one element.
        self_indices: slots that a query does not meet, such as those of its own key; -1 for none.
        implementation: ``"auto"``, ``"dense"`` or ``"blockwise"``.
        adapted_to: the moment gradient, as in ``sup_con``.

    Raises:
        TypeError: an argument that is not a tensor, or a queue that is not a ``FeatureQueue``.
        UserError: a temperature that is not above 0 and finite, an unknown implementation, or ``adapted_to`` with a
            queue that does not follow the batch.
        ValueError: shapes or, on a CPU, ``self_indices`` that do not fit.

    Example:
        >>> queue = FeatureQueue(size=4, dim=2, adaptation="xbm")
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> slots = queue.enqueue(keys)
        >>> info_nce(keys, keys, queue, temperature=1.0, self_indices=slots)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    _check(q, queue, temperature, k=k, self_indices=self_indices)
    kernels = _kernels(implementation, q, queue, temperature, adapted_to is None)
    with torch.autocast(q.device.type, enabled=False):
        pairs = Pairs(queue, temperature, self_indices, adapted_to=adapted_to)
        if kernels is not None:
            return kernels.info_nce(q, k, pairs)
        query, key = unit_rows(q), unit_rows(k)
        sums = _sums(implementation, temperature, queue).pair_sums(query, pairs)
        gap = sums.logsumexp - (query * key).sum(1) / temperature
        # -log(exp(s_qk) / (exp(s_qk) + exp(logsumexp))) = log(1 + exp(gap))
        return F.softplus(gap, threshold=40).sum() / max(len(q), 1) + _zero_or_nan(query)


def sup_con(
    embeddings: Float[Tensor, "B D"],
    labels: Shaped[Tensor, "B"],
    queue: FeatureQueue | None = None,
    *,
    temperature: float | Tensor = 0.1,
    miner: PairMargin | None = None,
    self_indices: Int64[Tensor, "B *E"] | None = None,
    implementation: str = "auto",
    adapted_to: Float[Tensor, "N D"] | None = None,
    on_pairs: Callable[[Tensor, Tensor], None] | None = None,
    sum_counts: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Return the supervised contrastive loss against the queue, or in the batch (arXiv 2004.11362, Eq. 2).

    For anchor i with positives P(i) and counted pairs A(i), positives among them::

        L_i = logsumexp_{a in A(i)} s_ia - mean_{p in P(i)} s_ip

    averaged over the anchors with L_i > 0, as in PML's SupConLoss after a PairMarginMiner; 0 without negative pairs.

    Args:
        embeddings: the anchors.
        labels: class of each anchor, whole numbers of any dtype.
        queue: a queue with labels; None: the batch without the anchor, always dense, with gradient to both sides.
        temperature: T > 0, a number or, to learn it, a tensor of one element.
        miner: which pairs count; None for all.
        self_indices: slots that an anchor does not meet, such as its own; -1 for none.
        implementation: ``"auto"``, ``"dense"`` or ``"blockwise"``.
        adapted_to: the batch, with its graph, that ``queue.adapt`` and ``queue.enqueue`` were called with last. The
            loss then has its gradient by the mean and the standard deviation of the batch too, with which XBN moves all
            older rows (``memory.following``). Its value does not change. None: rows are constants.
        on_pairs: called with the number of positive and of negative pairs, two tensors.
        sum_counts: returns the sum of an integer tensor over all processes, where each process has a part of the
            anchors. The result is then the part's share: the losses of all processes sum to the loss of all anchors.

    Raises:
        TypeError: an argument that is not a tensor, or a queue that is not a ``FeatureQueue``.
        UserError: a temperature that is not above 0 and finite, an unknown implementation or miner distance, or
            ``adapted_to`` with a queue whose rows do not follow the batch ("xbm", "axbn") or are sharded.
        ValueError: shapes or, on a CPU, ``self_indices`` that do not fit, fractional labels, a queue without labels.

    Example:
        >>> embeddings, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> sup_con(embeddings, labels, temperature=1.0)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    _check(embeddings, queue, temperature, labels=labels, self_indices=self_indices)
    if queue is None:
        implementation, self_indices = "dense", torch.arange(len(labels), device=embeddings.device)
    kernels = _kernels(implementation, embeddings, queue, temperature, adapted_to is None and sum_counts is None)
    with torch.autocast(embeddings.device.type, enabled=False):
        pairs = Pairs(queue, temperature, self_indices, labels, miner, adapted_to)
        if kernels is not None:
            loss, *counts = kernels.sup_con(embeddings, pairs)
            if on_pairs is not None:
                on_pairs(*counts)
            return loss
        anchors = unit_rows(embeddings)
        sums = _sums(implementation, temperature, queue).pair_sums(anchors, pairs, include_positives=True)
        positives, negatives = sums.positives, sums.negatives
        losses = sums.logsumexp - sums.positive_cosines / positives.clamp(min=1) / temperature
        # An anchor with one pair has loss 0, which rounding can make positive; it is not averaged, as in PML.
        averaged = (losses > 0) & (positives > 0) & (positives + negatives > 1)
        if on_pairs is not None:
            on_pairs(positives.sum(), negatives.sum())
        counts = torch.stack([averaged.sum(), negatives.sum()])
        anchors_averaged, all_negatives = counts if sum_counts is None else sum_counts(counts)
        total = losses.where(averaged & (all_negatives > 0), 0.0).sum()
        return total / anchors_averaged.clamp(min=1) + _zero_or_nan(anchors)


def nt_xent(
    embeddings: Float[Tensor, "B D"],
    labels: Shaped[Tensor, "B"],
    queue: FeatureQueue,
    *,
    temperature: float | Tensor = 0.07,
    miner: PairMargin | None = None,
    self_indices: Int64[Tensor, "B *E"] | None = None,
    implementation: str = "auto",
    adapted_to: Float[Tensor, "N D"] | None = None,
    on_pairs: Callable[[Tensor, Tensor], None] | None = None,
    sum_counts: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Return NT-Xent (arXiv 2002.05709, Eq. 1): each positive pair alone among its anchor's negatives.

    The mean over the counted positive pairs (i, p), with N(i) the counted negatives of anchor i, of::

        log(1 + exp(n_i - s_ip)),        n_i = logsumexp_{a in N(i)} s_ia

    and 0 if there is no positive pair. Value and gradient are those of PML's NTXentLoss, in less memory.

    Args:
        embeddings: the anchors.
        labels: class of each anchor, whole numbers of any dtype.
        queue: a queue with labels.
        temperature: T > 0, a number or, to learn it, a tensor of one element.
        miner: which pairs count; None for all.
        self_indices: as in ``sup_con``.
        implementation: as in ``sup_con``.
        adapted_to: as in ``sup_con``.
        on_pairs: as in ``sup_con``.
        sum_counts: as in ``sup_con``.

    Raises:
        TypeError, UserError, ValueError: as in ``sup_con``.

    Example:
        >>> queue = FeatureQueue(size=4, dim=2, adaptation="xbm", labels=True)
        >>> embeddings, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> slots = queue.enqueue(embeddings, labels)
        >>> nt_xent(embeddings, labels, queue, temperature=1.0, self_indices=slots)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    _check(embeddings, queue, temperature, labels=labels, self_indices=self_indices)
    if implementation not in ("auto", *_SUMS):
        raise UserError(f"expected an implementation out of {['auto', *_SUMS]}, got {implementation!r}")
    read = _sums(implementation, temperature, queue)
    with torch.autocast(embeddings.device.type, enabled=False):
        anchors, pairs = unit_rows(embeddings), Pairs(queue, temperature, self_indices, labels, miner, adapted_to)
        sums = read.pair_sums(anchors, pairs)
        if on_pairs is not None:
            on_pairs(sums.positives.sum(), sums.negatives.sum())
        total: Tensor = read.positive_softplus(anchors, sums.logsumexp, pairs).sum()
        count = sums.positives.sum() if sum_counts is None else sum_counts(sums.positives.sum())
        return total / count.clamp(min=1) + _zero_or_nan(anchors)


def check_temperature(temperature: float | Tensor) -> None:
    """Check a temperature. If it is a tensor, the host waits for its device.

    Raises:
        UserError: it is not above 0 and finite, or a tensor of more than one element.
    """
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise UserError(f"expected a temperature of one element, got shape {[*temperature.shape]}")
    if not 0 < temperature < float("inf"):
        raise UserError(f"expected a temperature above 0, got {float(temperature)}")


def unit_rows(embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Return the rows divided by their length, in float32 or float64. The gradient of a row of zeros is 0."""
    rows = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length.clamp(min=1e-12).masked_fill(length == 0, torch.inf)


def _zero_or_nan(anchors: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Return 0, or NaN for anchors that are not finite, whose pairs no comparison counts."""
    return (0 * anchors).sum()


def _check(batch: Tensor, queue: FeatureQueue | None, temperature: float | Tensor, **beside: Tensor | None) -> None:
    """Check shapes and temperature; ``beside`` are tensors with a row for each embedding."""
    check_temperature(temperature)
    check_tensors(embeddings=batch, **beside)
    if not (queue is None or isinstance(queue, FeatureQueue)):
        raise TypeError(f"expected a FeatureQueue as queue, got a {type(queue).__name__}")
    if batch.ndim != 2 or (queue is not None and batch.shape[1] != queue.dim):
        raise ValueError(f"expected embeddings of shape [B, {queue.dim if queue else 'D'}], got {[*batch.shape]}")
    for name, rows in beside.items():
        axes = None if name == "k" else 1
        if rows is not None and rows.shape[:axes] != batch.shape[:axes]:
            raise ValueError(f"expected {name} for embeddings of shape {[*batch.shape]}, got {[*rows.shape]}")
    indices = beside.get("self_indices")
    if indices is not None and indices.dtype != torch.int64:
        raise ValueError(f"expected self_indices of dtype torch.int64, got {indices.dtype}")


def _sums(implementation: str, temperature: float | Tensor, queue: FeatureQueue | None) -> ModuleType | AcrossShards:
    """Return what makes the sums, over all shards of the queue, where no kernels are used.

    Raises:
        UserError: a temperature that is a tensor, for an implementation or a queue without its gradient.
    """
    sharded = isinstance(queue, ShardedQueue)
    if isinstance(temperature, Tensor):  # its gradient is that of autograd
        if sharded or implementation not in ("auto", "dense"):
            what = "a sharded queue" if sharded else f"implementation={implementation!r}"
            raise UserError(f"expected a number as temperature for {what}, got a tensor")
        return dense
    read = _SUMS.get(implementation, blockwise)
    return AcrossShards(read) if sharded else read


def _kernels(
    implementation: str, embeddings: Tensor, queue: FeatureQueue | None, temperature: float | Tensor, plain: bool
) -> ModuleType | None:
    """Return the Triton kernels if they are to be used, else None.

    They take a plain loss: of all anchors, and with rows that are constants.

    Raises:
        UserError: an unknown implementation, or "triton" where it cannot be used.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"expected an implementation out of {list(IMPLEMENTATIONS)}, got {implementation!r}")
    wanted = implementation == "triton" or (implementation == "auto" and has_kernels(embeddings.device))
    if queue is None or not wanted or isinstance(temperature, Tensor):
        return None
    if has_triton(embeddings.device) and plain and not isinstance(queue, ShardedQueue):
        from selfsup_xbn.losses import kernels

        if kernels.supports(embeddings, queue, temperature):
            return kernels
    if implementation == "triton":
        raise UserError(
            "expected Triton and a GPU, all anchors and all rows in one process, rows that are constants, at most 512 "
            "dimensions, no float64, and a temperature of at least 1e-4 for implementation='triton', got "
            f"{[*embeddings.shape]} of {embeddings.dtype}, T {temperature}"
        )
    return None
