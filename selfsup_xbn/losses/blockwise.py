"""One pass over a queue: log-sum-exp of similarities and sums over positive pairs, with their gradient.

The gradient of a log-sum-exp over similarities by the anchor is attention whose values are the keys, so one pass gives
value and gradient, as in flash attention: a block of rows is adapted, multiplied, reduced and forgotten. Nothing of
size M x D or B x M ever exists, and no gradient reaches the queue. Rows are not normalised: their cosines are, and
their weights, which are fewer numbers.

Axis legend: B anchors, M queue rows, D dimensions, b rows of a block, E slots to leave out per anchor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.losses.online import LogSumExp, Positives, by_rows, unit_rows
from selfsup_xbn.losses.pairs import PairRule, QueueReader
from selfsup_xbn.memory.feature_queue import FeatureQueue


class Scan(NamedTuple):
    """Sums over the pairs of each anchor."""

    logsumexp: Float[Tensor, "B"]  # of the logits that count; FLOOR where none does
    positive_sum: Float[Tensor, "B"]  # of the positive logits
    positives: Float[Tensor, "B"]  # how many there are
    negatives: Int64[Tensor, "B"]  # how many there are


def scan_negatives(
    q: Float[Tensor, "B D"],
    k: Float[Tensor, "B D"],
    queue: FeatureQueue,
    temperature: float,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> Float[Tensor, ""]:
    """``losses.info_nce``: no pair is chosen, all rows are negatives but an anchor's own slots."""
    with torch.autocast(q.device.type, enabled=False):
        return _InfoNCE.apply(q, k, QueueReader(queue, temperature, own_slots))


def class_reader(
    queue: FeatureQueue, temperature: float, own_slots: Int64[Tensor, "B *E"] | None, rule: PairRule
) -> QueueReader:
    """How the passes below read a queue with labels; one reader serves several of them, as long as the queue stays.

    Args:
        queue: the memory; only its filled rows count, at unit length.
        temperature: T > 0.
        own_slots: slots that an anchor must not meet: its own copies, which have its label; -1 for none.
        rule: which pairs count.
    """
    if queue.labels is None:
        raise ValueError("expected a queue with labels: FeatureQueue(..., labels=True)")
    return QueueReader(queue, temperature, own_slots, rule)


def scan_classes(
    embeddings: Float[Tensor, "B D"], reader: QueueReader, *, count_negatives: bool = True
) -> tuple[Float[Tensor, ""], Int64[Tensor, ""], Int64[Tensor, ""]]:
    """``losses.sup_con`` of embeddings of any length, in one pass; how many positive and negative pairs it is made of.

    Gradient flows to the embeddings. Without ``count_negatives`` the last value is 0 only where there are none, which
    costs less.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return _SupCon.apply(embeddings, reader, count_negatives)


def scan_negative_pairs(
    unit: Float[Tensor, "B D"], reader: QueueReader
) -> tuple[Float[Tensor, "B"], Int64[Tensor, "B"]]:
    """Log-sum-exp of cos(anchor, row) / T over the negative pairs that count, and their number, of each anchor.

    ``unit`` are anchors of unit length, at least float32, to which gradient flows.
    """
    with torch.autocast(unit.device.type, enabled=False):
        return _NegativePairs.apply(unit, reader)


def scan_positives(
    unit: Float[Tensor, "B D"], negatives: Float[Tensor, "B"], reader: QueueReader
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Sum of ``log(1 + exp(negatives - s))`` over the logits s of each anchor's positive pairs, and their number.

    Gradient flows to the anchors and to ``negatives``, the log-sum-exp of each anchor's negative logits.
    """
    with torch.autocast(unit.device.type, enabled=False):
        return _PositivePairs.apply(unit, negatives, reader)


def sup_con_of(scan: Scan) -> tuple[Float[Tensor, ""], Float[Tensor, "B"]]:
    """SupCon of the sums of a pass, and each anchor's share of the mean: 0 for one that does not count."""
    has_positive = scan.positives > 0
    losses = torch.where(has_positive, scan.logsumexp - scan.positive_sum / scan.positives.clamp(min=1), 0.0)
    # The loss of a single pair is 0, whatever its rounding says.
    counts = (losses > 0) & (scan.positives + scan.negatives > 1) & (scan.negatives.sum() > 0)
    share = counts.to(losses.dtype) / counts.sum().clamp(min=1)
    return (losses * share).sum(), share


class _InfoNCE(torch.autograd.Function):
    """InfoNCE of queries and keys of any length, with its gradient by both."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, reader: QueueReader) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        (query, q_inverse), (key, k_inverse) = unit_rows(q.to(dtype)), unit_rows(k.to(dtype))
        scaled, sums = query / reader.temperature, LogSumExp(query, reader.bound)
        for block, _ in reader.plain(len(query)):
            rows, inverse, logits = reader.logits(scaled, block)
            reader.leave_out_(logits, block, sums.nothing)
            sums.add(logits, rows, inverse)
        negatives, attended = sums.result()
        gap = negatives - (scaled * key).sum(1)
        slope = gap.sigmoid().div_(len(q) * reader.temperature)[:, None]
        by_query = by_rows(attended.sub_(key).mul_(slope), query, q_inverse)
        by_key = by_rows(-slope * query, key, k_inverse) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(by_query, by_key)
        ctx.dtypes = q.dtype, k.dtype
        return F.softplus(gap, threshold=40).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Times the upstream gradient while it is precise: float16 cannot hold a loss scale, nor gradients before it.
        by_query, by_key = (_times(grads[0], *pair) for pair in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return by_query, by_key, None


class _SupCon(torch.autograd.Function):
    """SupCon of embeddings of any length, with its gradient, and the number of its pairs."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, reader: QueueReader, count_negatives: bool) -> tuple[Tensor, ...]:
        unit, inverse = unit_rows(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))
        positives = Positives(unit)
        logsumexp, attended, negatives = _read(unit, reader, positives, count_negatives)
        scan = Scan(logsumexp, positives.sum, positives.count, negatives)
        value, share = sup_con_of(scan)
        by_positive = (share / scan.positives.clamp(min=1))[:, None]
        by_unit = (attended * share[:, None]).addcmul_(positives.rows, by_positive, value=-1).div_(reader.temperature)
        ctx.save_for_backward(by_rows(by_unit, unit, inverse))
        ctx.dtype = embeddings.dtype
        counted = scan.positives.sum().long(), scan.negatives.sum()
        ctx.mark_non_differentiable(*counted)
        return value, *counted

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (by_embedding,) = ctx.saved_tensors
        return _times(grads[0], by_embedding, ctx.dtype), None, None


class _NegativePairs(torch.autograd.Function):
    """Log-sum-exp of each anchor's negative pairs, with its gradient, and their number."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, reader: QueueReader) -> tuple[Tensor, Tensor]:
        logsumexp, attended, negatives = _read(unit, reader, None, True)
        ctx.save_for_backward(attended)
        ctx.temperature = reader.temperature
        ctx.mark_non_differentiable(negatives)
        return logsumexp, negatives

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (attended,) = ctx.saved_tensors
        return grads[0][:, None] * attended / ctx.temperature, None


def _read(
    unit: Tensor, reader: QueueReader, positives: Positives | None, count_negatives: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over a queue with labels: log-sum-exp [B], its gradient by the anchors over T [B, D], negatives [B].

    The log-sum-exp is over negative pairs and, where ``positives`` are to be summed too, over those. Negatives of an
    anchor that are not counted one by one are a number that is 0 only where there are none.
    """
    scaled, sums = unit / reader.temperature, LogSumExp(unit, reader.bound)
    negatives, rule = torch.zeros(len(unit), dtype=torch.int64, device=unit.device), reader.rule
    assert rule is not None
    least = max(rule.above, sums.nothing)  # negatives that count are above it
    for block, skipped in reader.plain(len(unit)):
        rows, inverse, logits = reader.logits(scaled, block)
        few = reader.keeps_few(logits)
        if skipped:
            logits.index_fill_(1, torch.tensor(skipped), sums.nothing)
        if count_negatives:
            negatives.add_((logits > least).sum(1))
        if few:
            sums.add_few(logits, logits > least, rows, inverse)
        else:
            sums.add(F.threshold(logits, least, sums.nothing, inplace=True), rows, inverse)
    if not count_negatives:
        negatives.add_(~sums.empty())
    for block in reader.paired(len(unit)):
        rows, inverse, logits = reader.logits(scaled, block)
        positive, negative = reader.pairs(logits, block)
        negatives.add_(negative.sum(1))
        if positives is not None:
            positives.add(positive, logits, rows, inverse)
        counts = negative if positives is None else positive | negative
        sums.add(logits.masked_fill_(~counts, sums.nothing), rows, inverse)
    return *sums.result(), negatives


def _times(upstream: Tensor, gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else (upstream * gradient).to(dtype)


class _PositivePairs(torch.autograd.Function):
    """Sum of ``softplus(negatives - logit)`` over each anchor's positive pairs, in one more pass."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, negatives: Tensor, reader: QueueReader) -> tuple[Tensor, Tensor]:
        scaled, positives = unit / reader.temperature, Positives(unit, negatives)
        for block in reader.paired(len(unit)):
            rows, inverse, logits = reader.logits(scaled, block)
            positives.add(reader.pairs(logits, block).positive, logits, rows, inverse)
        ctx.save_for_backward(positives.slope, positives.rows)
        ctx.temperature = reader.temperature
        ctx.mark_non_differentiable(positives.count)
        return positives.sum, positives.count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, rows = ctx.saved_tensors
        return grads[0][:, None] * rows / ctx.temperature, -grads[0] * slope, None
