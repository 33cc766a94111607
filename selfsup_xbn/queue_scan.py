"""One pass over a queue: log-sum-exp of similarities and sums over positive pairs, with their gradient.

The gradient of a log-sum-exp over similarities by the anchor is attention whose values are the keys, so one pass gives
value and gradient, as in flash attention: a block of rows is adapted, multiplied, reduced and forgotten. Nothing of
size M x D or B x M ever exists, and no gradient reaches the queue. Rows are not normalised: their cosines are, and
their weights, which are fewer numbers.

Where pairs are chosen by labels, rows of the batch's own classes are few in a large queue. On a CPU they are looked at
in blocks of their own, pair by pair; all others are plain negatives. On an accelerator, where no shape may depend on
values, every block is looked at pair by pair.

Axis legend: B anchors, M queue rows, D dimensions, b rows of a block, E slots to leave out per anchor.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.feature_queue import Block, FeatureQueue, may_wait

FLOOR = -1e30
"""The logit of a pair that does not count: finite, so that differences are, and its exponential is 0."""
DEEP = -60.0
"""A logit so far below the largest one is raised to this: its exponential is lost in float64's rounding of the sum, and
is no denormal number, which would take a processor fifty times as long."""
BUCKETS = 2**16
FEW = 8  # rows are few where they are less than one in so many


class Pairs(NamedTuple):
    """The pairs of each anchor with some rows that count, as positives and as negatives."""

    positive: Bool[Tensor, "B b"]
    negative: Bool[Tensor, "B b"]


class PairRule(NamedTuple):
    """Which pairs count: of one label and a cosine below ``below``, or of two labels and a cosine above ``above``.

    ``scaled`` makes it a rule for logits, cosines divided by a temperature.
    """

    labels: Int64[Tensor, "B"]
    below: float = float("inf")
    above: float = -float("inf")

    def scaled(self, temperature: float) -> PairRule:
        """The same rule for cosines divided by ``temperature``."""
        return PairRule(self.labels, self.below / temperature, self.above / temperature)

    def select(self, logits: Float[Tensor, "B b"], labels: Int64[Tensor, "b"]) -> Pairs:
        """The pairs that count of the anchors with rows of these labels."""
        same = self.labels[:, None] == labels
        return Pairs(same & (logits < self.below), (logits > self.above) & ~same)


class Scan(NamedTuple):
    """What one pass over the references gives for each anchor."""

    logsumexp: Float[Tensor, "B"]  # of the logits that count; FLOOR where none does
    positive_sum: Float[Tensor, "B"]  # of the positive logits
    positives: Float[Tensor, "B"]  # how many there are
    negatives: Int64[Tensor, ""]  # how many all anchors have together


def scan_negatives(
    q: Float[Tensor, "B D"],
    k: Float[Tensor, "B D"],
    queue: FeatureQueue,
    temperature: float,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> Float[Tensor, ""]:
    """``losses.info_nce``: no pair is chosen, all rows are negatives but an anchor's own slots."""
    with torch.autocast(q.device.type, enabled=False):
        return _InfoNCE.apply(q, k, _Reader(queue, temperature, own_slots))


def scan_queue(
    unit: Float[Tensor, "B D"],
    queue: FeatureQueue,
    temperature: float,
    own_slots: Int64[Tensor, "B *E"] | None,
    rule: PairRule,
    *,
    positives_count: bool = True,
    count_negatives: bool = True,
) -> Scan:
    """Log-sum-exp of cos(anchor, row) / T over the pairs that count, and the sum of the positive ones, in one pass.

    Args:
        unit: anchors of unit length, at least float32. Gradient flows to them.
        queue: the memory; only its filled rows count, at unit length.
        temperature: T > 0.
        own_slots: slots that an anchor must not meet (its own copies); -1 for none.
        rule: which pairs count.
        positives_count: whether the log-sum-exp is over positive pairs too, or over negative ones alone.
        count_negatives: otherwise ``negatives`` is a number that is 0 only where there are none, which costs less.
    """
    if queue.labels is None:
        raise ValueError("expected a queue with labels: FeatureQueue(..., labels=True)")
    with torch.autocast(unit.device.type, enabled=False):
        reader = _Reader(queue, temperature, own_slots, rule)
        return Scan(*_QueueScan.apply(unit, reader, positives_count, count_negatives))


def scan_positives(
    unit: Float[Tensor, "B D"],
    negatives: Float[Tensor, "B"],
    queue: FeatureQueue,
    temperature: float,
    own_slots: Int64[Tensor, "B *E"] | None,
    rule: PairRule,
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Sum of ``log(1 + exp(negatives - s))`` over the logits s of each anchor's positive pairs, and their number.

    Gradient flows to the anchors and to ``negatives``, the log-sum-exp of each anchor's negative logits.
    """
    with torch.autocast(unit.device.type, enabled=False):
        return _PositivePairs.apply(unit, negatives, _Reader(queue, temperature, own_slots, rule))


def block_rows(anchors: int, queue: FeatureQueue) -> int:
    """Rows of a block: on a CPU a thread's share of the similarities is 1 MB, half of a core's cache, and on any device
    the rows are 16 MB at most."""
    cells = 2**18 * torch.get_num_threads() if queue.rows.device.type == "cpu" else 2**19
    rows = max(1, min(cells // anchors, 2**22 // queue.dim))
    # Compiled, each block is unrolled: better few than small.
    return max(rows, -(-queue.size // 8)) if torch.compiler.is_compiling() else rows


class _Reader:
    """How a pass reads a queue: which blocks there are, and which of their pairs count."""

    def __init__(
        self, queue: FeatureQueue, temperature: float, own_slots: Tensor | None, rule: PairRule | None = None
    ) -> None:
        if temperature <= 0:
            raise UserError(f"expected a temperature above 0, got {temperature}")
        self.queue, self.temperature, self.own_slots = queue, temperature, own_slots
        self.rule = None if rule is None else rule.scaled(temperature)
        self.own_range = (0, queue.size)
        self.related: Tensor | None = None
        if may_wait(queue.rows):
            if own_slots is not None:
                self.own_range = int(own_slots.min()), int(own_slots.max()) + 1
            if rule is not None:
                self.related = _related(queue, rule.labels)

    def plain(self, anchors: int) -> Iterator[tuple[Block, list[int]]]:
        """All blocks where pairs need not be looked at one by one, with the columns to pass over."""
        if self.rule is not None and self.related is None:
            return
        skipped = [] if self.related is None else self.related.tolist()
        for block in self.queue.blocks(block_rows(anchors, self.queue)):
            assert isinstance(block.slots, slice)
            start, stop = block.slots.start, block.slots.stop
            first, last = bisect.bisect_left(skipped, start), bisect.bisect_left(skipped, stop)
            yield block, [slot - start for slot in skipped[first:last]]

    def paired(self, anchors: int) -> Iterator[Block]:
        """All blocks in which any pair may be positive."""
        if self.rule is None:
            return
        rows = block_rows(anchors, self.queue)
        if self.related is None:
            yield from self.queue.blocks(rows)
            return
        for slots in self.related.split(rows):
            yield self.queue.gather(slots)

    def logits(self, scaled: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """The block's rows [b, D], the inverse of their lengths [b], and their logits [B, b] with anchors over T."""
        rows = block.features.to(scaled.dtype)
        inverse = _inverse(block.lengths.to(scaled.dtype))
        return rows, inverse, (scaled @ rows.T).mul_(inverse)

    def leave_out_(self, logits: Tensor, block: Block) -> None:
        """Puts FLOOR in the place of pairs that are an empty slot or an anchor's own copy."""
        if may_wait(logits) and self.own_slots is not None:
            if not self._is_foreign(block):
                assert isinstance(block.slots, slice)
                column = self.own_slots.view(len(logits), -1) - block.slots.start
                anchor, which = ((column >= 0) & (column < logits.shape[1])).nonzero().T
                logits[anchor, column[anchor, which]] = FLOOR
        elif (excluded := self.excluded(block)) is not None:
            logits.masked_fill_(excluded, FLOOR)

    def excluded(self, block: Block) -> Tensor | None:
        """[B, b] or [b] pairs that are an empty slot or an anchor's own copy; None where no pair is."""
        empty = None if block.filled is None else ~block.filled
        if self.own_slots is None or self._is_foreign(block):
            return empty
        slots = block.slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop, device=self.own_slots.device)
        own = (self.own_slots.flatten(1)[:, :, None] == slots) if self.own_slots.ndim > 1 else None
        own = self.own_slots[:, None] == slots if own is None else own.any(1)
        return own if empty is None else own | empty

    def _is_foreign(self, block: Block) -> bool:
        first, end = self.own_range
        return isinstance(block.slots, slice) and (block.slots.start >= end or block.slots.stop <= first)

    def pairs(self, logits: Tensor, block: Block) -> Pairs:
        """The pairs of the block that count."""
        assert self.rule is not None
        assert block.labels is not None
        found, excluded = self.rule.select(logits, block.labels), self.excluded(block)
        return found if excluded is None else Pairs(found.positive & ~excluded, found.negative & ~excluded)


def _related(queue: FeatureQueue, labels: Tensor) -> Tensor | None:
    """Ordered slots of all rows whose label is one of these, and of some more; None where they are not few."""
    assert queue.labels is not None
    # A table of buckets in place of an exact test: ten times as fast, and a row too many does no harm.
    table = torch.zeros(BUCKETS, dtype=torch.bool).index_fill_(0, labels % BUCKETS, True)
    found = table[queue.labels[: len(queue)] % BUCKETS].nonzero()[:, 0]
    return found if FEW * len(found) < len(queue) else None


class _InfoNCE(torch.autograd.Function):
    """InfoNCE of queries and keys of any length, with its gradient by both."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, reader: _Reader) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        (query, q_inverse), (key, k_inverse) = _unit(q.to(dtype)), _unit(k.to(dtype))
        scaled, sums = query / reader.temperature, _LogSumExp(query)
        for block, _ in reader.plain(len(query)):
            rows, inverse, logits = reader.logits(scaled, block)
            reader.leave_out_(logits, block)
            sums.add(logits, rows, inverse)
        negatives, attended = sums.result()
        gap = negatives - (scaled * key).sum(1)
        slope = gap.sigmoid().div_(len(q) * reader.temperature)[:, None]
        by_query = _by_length(attended.sub_(key).mul_(slope), query, q_inverse).to(q.dtype)
        by_key = _by_length(-slope * query, key, k_inverse).to(k.dtype) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(by_query, by_key)
        return F.softplus(gap, threshold=40).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_query, by_key = ctx.saved_tensors
        return grads[0] * by_query, None if by_key is None else grads[0] * by_key, None


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows at unit length, and what they were multiplied by [B, 1]."""
    inverse = _inverse(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    return rows * inverse, inverse


def _inverse(lengths: Tensor) -> Tensor:
    return lengths.clamp(min=1e-12).reciprocal_()


def _by_length(by_unit: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient by rows, of that by the rows at unit length."""
    along = (by_unit * unit).sum(1, keepdim=True)
    return torch.addcmul(by_unit, along, unit, value=-1).mul_(inverse)


class _QueueScan(torch.autograd.Function):
    """The pass of a loss that chooses pairs by labels; the gradient by the anchors is made on the way."""

    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, reader: _Reader, positives_count: bool, count_negatives: bool
    ) -> tuple[Tensor, ...]:
        scaled, sums, positives = unit / reader.temperature, _LogSumExp(unit), _Positives(unit)
        negatives, rule = torch.zeros((), dtype=torch.int64, device=unit.device), reader.rule
        assert rule is not None
        for block, skipped in reader.plain(len(unit)):
            rows, inverse, logits = reader.logits(scaled, block)
            F.threshold(logits, rule.above, FLOOR, inplace=True)
            if skipped:
                logits.index_fill_(1, torch.tensor(skipped), FLOOR)
            if count_negatives:
                negatives.add_((logits > FLOOR).count_nonzero())
            sums.add(logits, rows, inverse)
        if not count_negatives:
            negatives.add_((sums.peak > FLOOR).count_nonzero())
        for block in reader.paired(len(unit)):
            rows, inverse, logits = reader.logits(scaled, block)
            positive, negative = reader.pairs(logits, block)
            positives.add(positive, logits, rows, inverse)
            negatives.add_(negative.count_nonzero())
            counts = positive | negative if positives_count else negative
            sums.add(logits.masked_fill_(~counts, FLOOR), rows, inverse)
        logsumexp, attended = sums.result()
        ctx.save_for_backward(attended, positives.rows)
        ctx.temperature = reader.temperature
        ctx.mark_non_differentiable(positives.count, negatives)
        return logsumexp, positives.sum, positives.count, negatives

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        attended, positive_rows = ctx.saved_tensors
        grad = torch.addcmul(grads[0][:, None] * attended, grads[1][:, None], positive_rows)
        return grad / ctx.temperature, None, None, None


class _PositivePairs(torch.autograd.Function):
    """Sum of ``softplus(negatives - logit)`` over each anchor's positive pairs, in one more pass."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, negatives: Tensor, reader: _Reader) -> tuple[Tensor, Tensor]:
        scaled, positives = unit / reader.temperature, _Positives(unit, negatives)
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


class _LogSumExp:
    """Log-sum-exp of logits that come block by block, and the mean of the unit rows with their softmax as weights."""

    def __init__(self, unit: Tensor) -> None:
        self.peak = unit.new_full((len(unit), 1), FLOOR)  # the largest logit as yet
        self.total, self.attended = torch.zeros_like(self.peak), torch.zeros_like(unit)

    def add(self, logits: Tensor, rows: Tensor, inverse: Tensor) -> None:
        """Takes in a block; overwrites its logits."""
        peak = torch.maximum(self.peak, logits.amax(1, keepdim=True))
        shrink = (self.peak - peak).exp_()
        weights = logits.sub_(peak).clamp_(min=DEEP).exp_()
        self.total.mul_(shrink).add_(weights.sum(1, keepdim=True))
        self.attended.mul_(shrink).addmm_(weights.mul_(inverse), rows)
        self.peak = peak

    def result(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp [B] and weighted mean [B, D]; FLOOR and 0 for an anchor of which no pair counts."""
        total = self.total.clamp(min=1)  # it is at least 1 where any pair counts
        empty = self.peak == FLOOR  # its sums are of pairs that do not count
        return (self.peak + total.log())[:, 0], (self.attended / total).masked_fill_(empty, 0)


class _Positives:
    """Sums over each anchor's positive pairs: their number, their losses, and the rows times the losses' slopes.

    A pair's loss is its logit s, or softplus(negatives - s) where the log-sum-exp of the anchor's negatives is given.
    """

    def __init__(self, unit: Tensor, negatives: Tensor | None = None) -> None:
        self.negatives, self.rows = negatives, torch.zeros_like(unit)
        self.count, self.sum, self.slope = unit.new_zeros(3, len(unit)).unbind()

    def add(self, positive: Tensor, logits: Tensor, rows: Tensor, inverse: Tensor) -> None:
        """Takes in the positive pairs of a block."""
        loss, slope = logits, positive.to(logits.dtype)
        self.count.add_(slope.sum(1))
        if self.negatives is not None:
            gap = self.negatives[:, None] - logits
            loss, slope = F.softplus(gap, threshold=40), -gap.sigmoid() * slope
            self.slope.add_(slope.sum(1))
        self.sum.add_(loss.masked_fill(~positive, 0).sum(1))
        self.rows.addmm_(slope * inverse, rows)
