"""Losses of a batch against a queue, block by block: InfoNCE, and supervised contrastive with a pair margin miner.

Both are log-sum-exps over similarities to the queue. Their gradient by the anchors is attention with the values equal
to the keys, so one pass over the queue gives value and gradient, as in flash attention: a block of rows is
adapted, normalised, multiplied, reduced and forgotten. Nothing of size M x D or B x M ever exists, and no gradient
reaches the queue.

Statistics and products are at least float32, under autocast too.

Axis legend: B anchors, M queue rows, N references, D dimensions, b rows of a block, E slots to leave out per anchor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.feature_queue import Block, FeatureQueue

BLOCK_ROWS = 1024  # rows of 512 float32: 2 MB, which a core's cache holds


class PairMargin(NamedTuple):
    """Which pairs a loss sees: positives further apart than ``positive``, negatives nearer than ``negative``.

    Args:
        positive, negative: margins, in the distance's unit.
        distance: ``"euclidean"`` of the unit vectors, as PML's PairMarginMiner measures by default and the paper
            does, or ``"cosine"``: then margins are similarities, and positives *below* ``positive`` and negatives
            *above* ``negative`` are kept.
    """

    positive: float = 0.2
    negative: float = 0.8
    distance: str = "euclidean"

    def similarity_bounds(self) -> tuple[float, float]:
        """Positives are kept below the first cosine similarity, negatives above the second.

        For unit vectors d^2 = 2 - 2 cos, so d > m is cos < 1 - m^2 / 2.
        """
        if self.distance == "cosine":
            return self.positive, self.negative
        if self.distance != "euclidean":
            raise UserError(f"expected miner distance 'euclidean' or 'cosine', got {self.distance!r}")
        return 1 - self.positive**2 / 2, 1 - self.negative**2 / 2


class Pairs(NamedTuple):
    """The pairs of each anchor with some references that count, as positives and as negatives."""

    positive: Bool[Tensor, "B b"]
    negative: Bool[Tensor, "B b"]


class Scan(NamedTuple):
    """What one pass over the references gives for each anchor."""

    logsumexp: Float[Tensor, "B"]  # of the logits that count; -inf where none does
    positive_sum: Float[Tensor, "B"]  # of the positive logits
    positives: Float[Tensor, "B"]  # how many there are
    any_negative: Bool[Tensor, ""]  # whether any anchor has a negative


def select_pairs(
    cosine: Float[Tensor, "B b"],
    labels: Int64[Tensor, "B"],
    reference_labels: Int64[Tensor, "b"],
    miner: PairMargin | None,
) -> Pairs:
    """Positive pairs share a label, negative ones do not; the miner, if any, keeps the informative ones of each."""
    same = labels[:, None] == reference_labels
    if miner is None:
        return Pairs(same, ~same)
    below, above = miner.similarity_bounds()
    return Pairs(same & (cosine < below), (cosine > above) & ~same)


Select = Callable[[Tensor, Block], Pairs]


def scan_queue(
    anchors: Float[Tensor, "B D"],
    queue: FeatureQueue,
    temperature: float,
    own_slots: Int64[Tensor, "B *E"] | None = None,
    select: Select | None = None,
) -> Scan:
    """Log-sum-exp of cos(anchor, row) / T over the queue, and the sum of the positive ones, in one pass.

    Args:
        anchors: any length; they are normalised here, the queue's rows as they are read. Gradient flows to them.
        queue: the memory; only its filled rows count.
        temperature: T > 0.
        own_slots: slots that an anchor must not meet (its own copies); -1 for none.
        select: makes of a block's cosines the pairs that count; None: all do, and none is positive.
    """
    if temperature <= 0:
        raise UserError(f"expected a temperature above 0, got {temperature}")
    if own_slots is not None and own_slots.ndim == 1:
        own_slots = own_slots[:, None]
    with torch.autocast(anchors.device.type, enabled=False):
        unit = F.normalize(anchors.to(torch.promote_types(anchors.dtype, torch.float32)), dim=1)
        return Scan(*_QueueScan.apply(unit, queue, temperature, own_slots, select))


class _QueueScan(torch.autograd.Function):
    """One pass over the queue with an online softmax; the gradient by the anchors is made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        queue: FeatureQueue,
        temperature: float,
        own_slots: Tensor | None,
        select: Select | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        B, D = unit.shape
        peak = unit.new_full((B,), torch.finfo(unit.dtype).min / 2)
        total, attended = unit.new_zeros(B), unit.new_zeros(B, D)
        positives = _Positives(unit)
        any_negative = torch.ones((), dtype=torch.bool, device=unit.device) if select is None else None

        for block in queue.blocks(BLOCK_ROWS):
            rows = _normalize_(block.features).to(unit.dtype)
            logits = unit @ rows.T  # [B, b], cosines as yet
            counts = _may_count(block, own_slots, logits)
            pairs = None if select is None else select(logits, block)
            logits.div_(temperature)
            if pairs is not None:
                positive, negative = pairs if counts is None else (pairs.positive & counts, pairs.negative & counts)
                positives.add(positive, logits, rows)
                any_negative = negative.any() if any_negative is None else any_negative | negative.any()
                counts = positive | negative
            if counts is not None:
                logits.masked_fill_(~counts, -torch.inf)
            new_peak = torch.maximum(peak, logits.amax(1))
            shrink = (peak - new_peak).exp_()
            weights = logits.sub_(new_peak[:, None]).exp_()
            total.mul_(shrink).add_(weights.sum(1))
            attended.mul_(shrink[:, None]).addmm_(weights, rows)
            peak = new_peak

        if any_negative is None:  # the queue is empty
            any_negative = torch.zeros((), dtype=torch.bool, device=unit.device)
        attended.div_(total.clamp(min=torch.finfo(unit.dtype).tiny)[:, None])
        ctx.save_for_backward(attended, positives.rows)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(positives.count, any_negative)
        return peak + total.log(), positives.sum, positives.count, any_negative

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        attended, positive_rows = ctx.saved_tensors
        by_logsumexp, by_positive_sum = grads[0], grads[1]
        grad = by_logsumexp[:, None] * attended + by_positive_sum[:, None] * positive_rows
        return grad / ctx.temperature, None, None, None, None


class _Positives:
    """Sum, number and sum of rows of each anchor's positive pairs."""

    def __init__(self, unit: Tensor) -> None:
        self.sum, self.count, self.rows = unit.new_zeros(len(unit)), unit.new_zeros(len(unit)), torch.zeros_like(unit)

    def add(self, positive: Tensor, logits: Tensor, rows: Tensor) -> None:
        if _may_wait(rows):
            anchor, row = positive.nonzero(as_tuple=True)  # few: a product over the whole block would cost more
            if len(anchor):
                self.sum.index_add_(0, anchor, logits[anchor, row])
                self.count.index_add_(0, anchor, torch.ones_like(anchor, dtype=rows.dtype))
                self.rows.index_add_(0, anchor, rows[row])
            return
        mask = positive.to(rows.dtype)
        self.sum.add_((mask * logits).sum(1))
        self.count.add_(mask.sum(1))
        self.rows.addmm_(mask, rows)


def _may_wait(tensor: Tensor) -> bool:
    """Whether shapes may depend on values here: on a CPU, where nothing is waited for, and not when compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _normalize_(features: Tensor) -> Tensor:
    """Rows divided by their length, in place."""
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features.div_(length.clamp_(min=1e-12))


def _may_count(block: Block, own_slots: Tensor | None, logits: Tensor) -> Tensor | None:
    """[B, b] pairs that are neither an empty slot nor an anchor's own copy; None where all of the block's are."""
    filled = None if block.filled is None else block.filled[None]
    if own_slots is None:
        return filled
    width = logits.shape[1]
    local = own_slots - block.start
    inside = (local >= 0) & (local < width)
    if _may_wait(logits) and not inside.any():
        return filled
    # A column more than the block has takes the slots that lie outside it, so that nothing depends on their number.
    others = torch.ones(len(logits), width + 1, dtype=torch.bool, device=logits.device)
    others = others.scatter_(1, torch.where(inside, local, width), False)[:, :width]
    return others if filled is None else others & filled


def scan_references(
    anchors: Float[Tensor, "B D"],
    references: Float[Tensor, "N D"],
    temperature: float,
    select: Callable[[Tensor], Pairs],
) -> Scan:
    """What ``scan_queue`` gives, of references in a plain tensor; gradient flows to both sides."""
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        cosine = F.normalize(anchors.to(dtype), dim=1) @ F.normalize(references.to(dtype), dim=1).T
        positive, negative = select(cosine.detach())
        logits = cosine / temperature
        kept = logits.masked_fill(~(positive | negative), torch.finfo(dtype).min / 2)
        return Scan(kept.logsumexp(1), (logits * positive).sum(1), positive.sum(1).to(dtype), negative.any())


def info_nce(
    q: Float[Tensor, "B D"],
    k: Float[Tensor, "B D"],
    queue: FeatureQueue,
    temperature: float = 0.1,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE of queries and their keys against the queue's rows as negatives (MoCo, arXiv 1911.05722, Eq. 1).

    ``-log(exp(q.k/T) / (exp(q.k/T) + sum_j exp(q.r_j/T)))`` with all vectors of unit length, mean over the batch.

    Args:
        q, k: queries and keys, of any length; row i of one belongs to row i of the other.
        queue: the negatives r_j.
        temperature: T > 0.
        own_slots: where the keys themselves stand in the queue, if they do: the row that is each query's own
            positive is no negative of it. -1 for none.
    """
    negatives = scan_queue(q, queue, temperature, own_slots).logsumexp
    with torch.autocast(q.device.type, enabled=False):
        positive = F.cosine_similarity(q.to(negatives.dtype), k.to(negatives.dtype), dim=1, eps=1e-12) / temperature
        return F.softplus(negatives - positive, threshold=40).mean()


def sup_con(
    embeddings: Float[Tensor, "B D"],
    labels: Int64[Tensor, "B"],
    queue: FeatureQueue | None = None,
    *,
    temperature: float = 0.1,
    miner: PairMargin | None = None,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> Float[Tensor, ""]:
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362, Eq. 2) against the queue, or in the batch.

    For anchor i with positives P(i) and kept pairs A(i), positives among them::

        L_i = logsumexp_{a in A(i)} s_ia - mean_{p in P(i)} s_ip,        s = cos / T

    averaged over the anchors with L_i > 0, and 0 where the batch has no negative pair at all: value and gradient are
    those of PML's SupConLoss after a PairMarginMiner.

    Args:
        embeddings: z, of any length.
        labels: class of each embedding.
        queue: a queue with labels; None: the batch itself is the reference (self left out), with gradient to both sides.
        temperature: T > 0.
        miner: which pairs count; None for all.
        own_slots: where the batch itself stands in the queue, if it does; -1 for none.
    """
    if queue is None:
        others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)

        def select(cosine: Tensor) -> Pairs:
            pairs = select_pairs(cosine, labels, labels, miner)
            return Pairs(pairs.positive & others, pairs.negative & others)

        return _sup_con(scan_references(embeddings, embeddings, temperature, select))
    if queue.labels is None:
        raise ValueError("expected a queue with labels: FeatureQueue(..., labels=True)")

    def select_in_block(cosine: Tensor, block: Block) -> Pairs:
        assert block.labels is not None
        return select_pairs(cosine, labels, block.labels, miner)

    return _sup_con(scan_queue(embeddings, queue, temperature, own_slots, select_in_block))


def _sup_con(scan: Scan) -> Float[Tensor, ""]:
    has_positive = scan.positives > 0
    logsumexp = torch.where(has_positive, scan.logsumexp, 0.0)
    losses = logsumexp - scan.positive_sum / scan.positives.clamp(min=1)
    counts = has_positive & (losses > 0) & scan.any_negative
    return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp(min=1)
