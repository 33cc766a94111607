"""How a loss reads a queue: in blocks, with the pairs that count in each.

Where pairs are chosen by labels, rows of the batch's own classes are few in a large queue. On a CPU they are looked at
in blocks of their own, pair by pair; all others are plain negatives. On an accelerator, where no shape may depend on
values, every block is looked at pair by pair.

Axis legend: B anchors, M queue rows, D dimensions, b rows of a block, E slots to leave out per anchor.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.losses.online import inverse_of
from selfsup_xbn.memory.device import can_sync
from selfsup_xbn.memory.feature_queue import Block, FeatureQueue

BUCKETS = 2**16
FEW = 8  # rows are few where they are less than one in so many
FEW_PAIRS = 24  # and so are pairs
SAMPLED = 61  # one column of so many tells how many pairs there are; no multiple of a batch's size


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


def block_rows(anchors: int, queue: FeatureQueue) -> int:
    """Rows of a block: on a CPU a thread's share of the similarities is 1 MB, half of a core's cache, and on any device
    the rows are 16 MB at most.
    """
    if torch.compiler.is_compiling():  # each block is unrolled: better few than small
        return -(-queue.size // 8)
    cells = 2**18 * torch.get_num_threads() if queue.rows.device.type == "cpu" else 2**19
    return max(1, min(cells // anchors, 2**22 // queue.dim))


class QueueReader:
    """How a pass reads a queue: which blocks there are, and which of their pairs count."""

    def __init__(
        self, queue: FeatureQueue, temperature: float, own_slots: Tensor | None, rule: PairRule | None = None
    ) -> None:
        if temperature <= 0:
            raise UserError(f"expected a temperature above 0, got {temperature}")
        self.queue, self.temperature, self.own_slots = queue, temperature, own_slots
        self.bound = 1 / temperature  # of logits, which are cosines over it
        self.affine_map = queue.affine_map()
        self.rule = None if rule is None else rule.scaled(temperature)
        self.own_range: tuple[int, int] | None = None  # where it can be known without waiting
        self.related: Tensor | None = None
        if can_sync(queue.rows):
            if own_slots is not None:
                first, last = own_slots.aminmax()
                self.own_range = int(first), int(last) + 1
            if rule is not None:
                self.related = _related(queue, rule.labels)

    def plain(self, anchors: int) -> Iterator[tuple[Block, list[int]]]:
        """All blocks where pairs need not be looked at one by one, with the columns to pass over."""
        if self.rule is not None and self.related is None:
            return
        related = None if self.related is None else self.related.tolist()
        for block in self.queue.blocks(block_rows(anchors, self.queue)):
            yield block, [] if related is None else _inside(related, block)

    def paired(self, anchors: int) -> Iterator[Block]:
        """All blocks in which any pair may be positive."""
        if self.rule is None:
            return
        rows = block_rows(anchors, self.queue)
        if self.related is None:
            yield from self.queue.blocks(rows)
            return
        for start in range(0, len(self.related), rows):
            yield self.queue.gather(self.related[start : start + rows])

    def logits(self, scaled: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """The block's rows [b, D], the inverse of their lengths [b], and their logits [B, b] with anchors over T.

        The rows stand on the left, which a CPU multiplies faster; so the logits lie in memory column by column.
        """
        rows = self.affine_map(block.rows).to(scaled.dtype)
        inverse = inverse_of(torch.linalg.vector_norm(rows, dim=1))
        return rows, inverse, (rows @ scaled.T).T.mul_(inverse)

    def keeps_few(self, logits: Tensor) -> bool:
        """Whether few pairs of a block of plain negatives are kept, by a sample of them."""
        assert self.rule is not None
        sample = logits[:, ::SAMPLED] > self.rule.above
        return FEW_PAIRS * int(sample.count_nonzero()) < sample.numel()

    def leave_out_(self, logits: Tensor, block: Block, nothing: float) -> None:
        """Puts ``nothing`` in the place of pairs that are an empty slot or an anchor's own copy; of a run of slots."""
        if block.valid is not None:
            logits.masked_fill_(~block.valid, nothing)
        if self.own_slots is None or self._is_foreign(block):
            return
        assert isinstance(block.slots, slice)
        own = self.own_range
        if own is not None and block.slots.start <= own[0] and own[1] <= block.slots.stop:
            logits.scatter_(1, self.own_slots.view(len(logits), -1) - block.slots.start, nothing)
            return
        for slots in self.own_slots.view(len(logits), -1).split(1, dim=1):
            column = slots - block.slots.start
            inside = column.clamp(0, logits.shape[1] - 1)
            logits.scatter_(1, inside, logits.gather(1, inside).masked_fill_(column == inside, nothing))

    def excluded(self, block: Block) -> Tensor | None:
        """[B, b] or [b] pairs that are an empty slot or an anchor's own copy; None where no pair is."""
        empty = None if block.valid is None else ~block.valid
        if self.own_slots is None or self._is_foreign(block):
            return empty
        slots = block.slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop, device=self.own_slots.device)
        own = (self.own_slots.view(len(self.own_slots), -1, 1) == slots).any(1)
        return own if empty is None else own | empty

    def _is_foreign(self, block: Block) -> bool:
        if self.own_range is None or not isinstance(block.slots, slice):
            return False
        first, end = self.own_range
        return block.slots.start >= end or block.slots.stop <= first

    def pairs(self, logits: Tensor, block: Block) -> Pairs:
        """The pairs of the block that count."""
        assert self.rule is not None
        assert block.labels is not None
        found, excluded = self.rule.select(logits, block.labels), self.excluded(block)
        return found if excluded is None else Pairs(found.positive & ~excluded, found.negative & ~excluded)


def _inside(slots: list[int], block: Block) -> list[int]:
    """Which columns of the block these ordered slots are."""
    assert isinstance(block.slots, slice)
    first, last = (bisect.bisect_left(slots, end) for end in (block.slots.start, block.slots.stop))
    return [slot - block.slots.start for slot in slots[first:last]]


def _related(queue: FeatureQueue, labels: Tensor) -> Tensor | None:
    """Ordered slots of all rows whose label is one of these, and of some more; None where they are not few."""
    assert queue.labels is not None
    # A table of buckets in place of an exact test: ten times as fast, and a row too many does no harm.
    table = torch.zeros(BUCKETS, dtype=torch.bool).index_fill_(0, labels & (BUCKETS - 1), True)
    found = table[queue.labels[: len(queue)] & (BUCKETS - 1)].nonzero()[:, 0]
    return found if FEW * len(found) < len(queue) else None
