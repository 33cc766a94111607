"""Losses of a batch against a queue, block by block: InfoNCE, and SupCon and NT-Xent with a pair margin miner.

All are log-sum-exps over similarities to the queue. Their gradient by the anchors is attention with the values equal
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
from selfsup_xbn.feature_queue import Block, FeatureQueue, may_wait

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
    negatives: Int64[Tensor, ""]  # how many all anchors have together; 0 where nothing selects pairs


class PairLoss(NamedTuple):
    """A loss, and how many pairs it is made of."""

    value: Float[Tensor, ""]
    positives: Int64[Tensor, ""]
    negatives: Int64[Tensor, ""]


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
    with torch.autocast(anchors.device.type, enabled=False):
        return Scan(*_QueueScan.apply(_unit(anchors), queue, temperature, own_slots, select))


def _unit(anchors: Tensor) -> Tensor:
    return F.normalize(anchors.to(torch.promote_types(anchors.dtype, torch.float32)), dim=1)


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
        negatives = torch.zeros((), dtype=torch.int64, device=unit.device)

        for block in queue.blocks(BLOCK_ROWS):
            rows, logits, counts, pairs = _meet(unit, block, temperature, own_slots, select)
            if pairs is not None:
                positives.add(pairs.positive, logits, rows)
                negatives.add_(pairs.negative.count_nonzero())
                counts = pairs.positive | pairs.negative
            if counts is not None:
                logits.masked_fill_(~counts, -torch.inf)
            new_peak = torch.maximum(peak, logits.amax(1))
            shrink = (peak - new_peak).exp_()
            weights = logits.sub_(new_peak[:, None]).exp_()
            total.mul_(shrink).add_(weights.sum(1))
            attended.mul_(shrink[:, None]).addmm_(weights, rows)
            peak = new_peak

        attended.div_(total.clamp(min=torch.finfo(unit.dtype).tiny)[:, None])
        ctx.save_for_backward(attended, positives.rows)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(positives.count, negatives)
        return peak + total.log(), positives.sum, positives.count, negatives

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        attended, positive_rows = ctx.saved_tensors
        by_logsumexp, by_positive_sum = grads[0], grads[1]
        grad = by_logsumexp[:, None] * attended + by_positive_sum[:, None] * positive_rows
        return grad / ctx.temperature, None, None, None, None


class _PositivePairs(torch.autograd.Function):
    """Sum of ``softplus(negatives - logit)`` over each anchor's positive pairs, in one more pass over the queue."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        negatives: Tensor,
        queue: FeatureQueue,
        temperature: float,
        own_slots: Tensor | None,
        select: Select,
    ) -> tuple[Tensor, Tensor]:
        positives = _Positives(unit, negatives)
        for block in queue.blocks(BLOCK_ROWS):
            rows, logits, _, pairs = _meet(unit, block, temperature, own_slots, select)
            assert pairs is not None
            positives.add(pairs.positive, logits, rows)
        ctx.save_for_backward(positives.slope, positives.rows)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(positives.count)
        return positives.sum, positives.count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, rows = ctx.saved_tensors
        by_unit = grads[0][:, None] * rows / ctx.temperature
        return by_unit, -grads[0] * slope, None, None, None, None


class _Positives:
    """Sums over each anchor's positive pairs: their number, their losses, and the rows times the losses' slopes.

    A pair's loss is its logit s, or softplus(negatives - s) where the log-sum-exp of the anchor's negatives is given.
    """

    def __init__(self, unit: Tensor, negatives: Tensor | None = None) -> None:
        self.negatives, self.rows = negatives, torch.zeros_like(unit)
        self.count, self.sum, self.slope = unit.new_zeros(3, len(unit)).unbind()

    def add(self, positive: Tensor, logits: Tensor, rows: Tensor) -> None:
        if may_wait(rows):  # few pairs: their losses alone, and a sparse product
            anchor, row = pairs = positive.nonzero().T
            loss, slope = self._loss(logits[anchor, row], anchor)
            self.count.index_add_(0, anchor, torch.ones_like(slope))
            self.sum.index_add_(0, anchor, loss)
            self.slope.index_add_(0, anchor, slope)
            self.rows.add_(
                torch.sparse_coo_tensor(pairs, slope, positive.shape, is_coalesced=True, check_invariants=False) @ rows
            )
            return
        loss, slope = self._loss(logits, torch.arange(len(logits), device=logits.device)[:, None])
        slope = slope * positive
        self.count.add_(positive.sum(1))
        self.sum.add_((loss * positive).sum(1))
        self.slope.add_(slope.sum(1))
        self.rows.addmm_(slope, rows)

    def _loss(self, logits: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and slope of some pairs, of which the anchors are given."""
        if self.negatives is None:
            return logits, torch.ones_like(logits)
        gap = self.negatives[anchor] - logits
        return F.softplus(gap, threshold=40), -gap.sigmoid()


def _meet(
    unit: Tensor, block: Block, temperature: float, own_slots: Tensor | None, select: Select | None
) -> tuple[Tensor, Tensor, Tensor | None, Pairs | None]:
    """The block's rows at unit length, their logits [B, b], which of those count, and the selected pairs that do."""
    rows = _normalize_(block.features).to(unit.dtype)
    logits = unit @ rows.T  # cosines as yet
    counts = _may_count(block, own_slots, logits)
    pairs = None if select is None else select(logits, block)
    if pairs is not None and counts is not None:
        pairs = Pairs(pairs.positive & counts, pairs.negative & counts)
    return rows, logits.div_(temperature), counts, pairs


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
    local = own_slots.view(len(logits), -1) - block.start
    inside = (local >= 0) & (local < width)
    if may_wait(logits) and not inside.any():
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
        return Scan(kept.logsumexp(1), (logits * positive).sum(1), positive.sum(1).to(dtype), negative.count_nonzero())


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
        queue: a queue with labels; None: the batch itself is the reference, self left out, gradient to both sides.
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
    return sup_con_pairs(embeddings, labels, queue, temperature=temperature, miner=miner, own_slots=own_slots).value


def sup_con_pairs(
    embeddings: Float[Tensor, "B D"],
    labels: Int64[Tensor, "B"],
    queue: FeatureQueue,
    *,
    temperature: float = 0.1,
    miner: PairMargin | None = None,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> PairLoss:
    """``sup_con`` against a queue, with the number of its pairs."""
    scan = scan_queue(embeddings, queue, temperature, own_slots, _by_label(labels, queue, miner))
    return PairLoss(_sup_con(scan), scan.positives.sum().long(), scan.negatives)


def _sup_con(scan: Scan) -> Float[Tensor, ""]:
    has_positive = scan.positives > 0
    logsumexp = torch.where(has_positive, scan.logsumexp, 0.0)
    losses = logsumexp - scan.positive_sum / scan.positives.clamp(min=1)
    counts = has_positive & (losses > 0) & (scan.negatives > 0)
    return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp(min=1)


def nt_xent(
    embeddings: Float[Tensor, "B D"],
    labels: Int64[Tensor, "B"],
    queue: FeatureQueue,
    *,
    temperature: float = 0.07,
    miner: PairMargin | None = None,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> Float[Tensor, ""]:
    """NT-Xent of labelled embeddings against the queue: each positive pair alone among its anchor's negatives.

    The mean over the kept positive pairs (i, p), with N(i) the kept negatives of i, of::

        log(1 + exp(n_i - s_ip)),        n_i = logsumexp_{a in N(i)} s_ia,        s = cos / T

    and 0 where there is no positive or no negative pair: value and gradient are those of PML's NTXentLoss, which makes
    a matrix of positive pairs x negative pairs. Here the queue is read twice, for n and for the pairs.

    Args: those of ``sup_con``.
    """
    return nt_xent_pairs(embeddings, labels, queue, temperature=temperature, miner=miner, own_slots=own_slots).value


def nt_xent_pairs(
    embeddings: Float[Tensor, "B D"],
    labels: Int64[Tensor, "B"],
    queue: FeatureQueue,
    *,
    temperature: float = 0.07,
    miner: PairMargin | None = None,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> PairLoss:
    """``nt_xent`` with the number of its pairs."""
    select = _by_label(labels, queue, miner)

    def negatives_alone(cosine: Tensor, block: Block) -> Pairs:
        negative = select(cosine, block).negative
        return Pairs(torch.zeros_like(negative), negative)

    scan = scan_queue(embeddings, queue, temperature, own_slots, negatives_alone)
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = _unit(embeddings)
        losses, count = _PositivePairs.apply(unit, scan.logsumexp, queue, temperature, own_slots, select)
        positives = count.sum()
        return PairLoss(losses.sum() / positives.clamp(min=1), positives.long(), scan.negatives)


def _by_label(labels: Int64[Tensor, "B"], queue: FeatureQueue, miner: PairMargin | None) -> Select:
    """Selects pairs of a block by its labels."""
    if queue.labels is None:
        raise ValueError("expected a queue with labels: FeatureQueue(..., labels=True)")

    def select(cosine: Tensor, block: Block) -> Pairs:
        assert block.labels is not None
        return select_pairs(cosine, labels, block.labels, miner)

    return select
