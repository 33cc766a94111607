"""Which pairs of an anchor and a row a loss counts, and how it reads them.

Axis legend: B anchors, M queue rows, D dimensions, b rows of a block, E own rows of an anchor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.memory.device import can_sync
from selfsup_xbn.memory.feature_queue import Block, FeatureQueue
from selfsup_xbn.memory.following import Following
from selfsup_xbn.utils.labels import class_indices

NOT_COUNTED = -1e30
"""The logit of a pair that does not count. Its exponential is 0, and differences with it are finite."""
FEW = 8  # the batch's classes are read apart if they have fewer than one row in so many


class Rows(NamedTuple):
    """Some rows of the memory."""

    unit: Float[Tensor, "b D"]
    length: Float[Tensor, "b 1"]  # before they were divided by it
    constant: Bool[Tensor, "b"] | None  # which of them do not follow the batch; None: all do, or it does not matter


PairBlock = tuple[Rows, Tensor, Tensor, Tensor]
"""Rows, logits [B, b], which pairs count as positives [B, b], and which as negatives [B, b]."""


class PairMargin(NamedTuple):
    """Keep positives that are farther apart than one margin, and negatives that are nearer than another.

    Args:
        positive, negative: margins, in the unit of the distance.
        distance: ``"euclidean"`` between unit vectors, as in the paper and by default in PML's PairMarginMiner. With
            ``"cosine"`` margins are similarities: positives below and negatives above them are kept.
    """

    positive: float = 0.2
    negative: float = 0.8
    distance: str = "euclidean"

    def similarity_bounds(self) -> tuple[float, float]:
        """Return the cosine below which positives are kept, and the one above which negatives are.

        For unit vectors d^2 = 2 - 2 cos, so d > m is cos < 1 - m^2 / 2.

        Raises:
            UserError: the distance is neither "euclidean" nor "cosine".
        """
        if self.distance == "cosine":
            return self.positive, self.negative
        if self.distance != "euclidean":
            raise UserError(f"expected miner distance 'euclidean' or 'cosine', got {self.distance!r}")
        return 1 - self.positive**2 / 2, 1 - self.negative**2 / 2


class Pairs:
    """The pairs of unit anchors with the rows of a queue, or, without one, with each other.

    On a CPU the rows of the batch's classes are read apart, if they are few; of all others only negatives are counted.
    On an accelerator, where no shape may depend on values, all rows are ``mixed``.

    Args:
        queue: the memory; None: the batch, without the anchor itself.
        temperature: T; logits are cosines over it.
        self_indices: slots that an anchor does not meet; -1 for none.
        labels: class of each anchor, whole numbers of any dtype; None: every pair is a negative.
        miner: margins; None counts every pair.
        adapted_to: batch that the queue was adapted to, and that it took, last; rows of the memory then have a gradient
            by its moments.

    Raises:
        UserError, ValueError: the miner's distance, the queue's labels, or, on a CPU, the slots are wrong.
    """

    def __init__(
        self,
        queue: FeatureQueue | None,
        temperature: float | Tensor,
        self_indices: Int64[Tensor, "B *E"] | None = None,
        labels: Shaped[Tensor, "B"] | None = None,
        miner: PairMargin | None = None,
        adapted_to: Float[Tensor, "N D"] | None = None,
    ) -> None:
        below, above = (float("inf"), -float("inf")) if miner is None else miner.similarity_bounds()
        self.queue, self.self_indices = queue, self_indices
        self.own_range: tuple[int, int] | None = None  # lowest and highest own slot, where the host can read them
        if self_indices is not None and self_indices.numel() and can_sync(self_indices):
            lowest, highest = (int(slot) for slot in self_indices.aminmax())
            self.own_range = lowest, highest
            if queue is not None and (lowest < -1 or highest >= queue.size):
                raise ValueError(f"expected self_indices in [-1, {queue.size}), got {lowest} to {highest}")
        self.following = None if adapted_to is None or queue is None else Following(queue, adapted_to)
        # A tensor where all pairs are in one matrix.
        self.temperature: Any = temperature if isinstance(temperature, Tensor) else float(temperature)
        self.below: Any = below / self.temperature
        self.above: Any = above / self.temperature
        if labels is not None and queue is not None and queue.labels is None:
            raise ValueError("expected a queue with labels: FeatureQueue(..., labels=True)")
        self.labels = None if labels is None else class_indices(labels, len(labels))
        self.same_class: Tensor | None = None  # slots of the rows of the batch's classes, where they are read apart
        if self.labels is not None and queue is not None and queue.labels is not None and can_sync(queue.rows):
            slots = torch.isin(queue.labels[: len(queue)], self.labels.unique()).nonzero()[:, 0]
            self.same_class = slots if FEW * len(slots) < len(queue) else None

    def matrix(self, anchors: Float[Tensor, "B D"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return all unit rows, and their pairs as in ``mixed``. Without a queue gradient flows to both sides."""
        slots = torch.arange(len(anchors), device=anchors.device)
        block, rows = Block(slots, anchors, self.labels, None), anchors
        if self.queue is not None:
            block = next(self.queue.blocks(self.queue.size), self.queue.gather(slots[:0]))
            rows = self.queue.affine_map()(block.rows)
            if self.following is not None:
                rows = self.following.rows(rows, block.slots)
            rows = F.normalize(rows, dim=1).to(anchors.dtype)
        logits = anchors @ rows.T / self.temperature
        return rows, logits, *self._choose(block, logits)

    def negatives_only(self, anchors: Float[Tensor, "B D"]) -> Iterator[tuple[Rows, Tensor]]:
        """Yield rows that are no positives, and logits [B, b], ``NOT_COUNTED`` where a pair does not count."""
        if self.labels is not None and self.same_class is None:
            return
        for block, rows, logits in self._compare(anchors, None):
            if self.same_class is None:
                self._leave_out_(logits, block)
            else:
                assert isinstance(block.slots, slice)
                ends = torch.tensor([block.slots.start, block.slots.stop])
                first, last = torch.searchsorted(self.same_class, ends).tolist()
                logits.index_fill_(1, self.same_class[first:last] - block.slots.start, NOT_COUNTED)
                F.threshold(logits, self.above, NOT_COUNTED, inplace=True)
            yield rows, logits

    def mixed(self, anchors: Float[Tensor, "B D"]) -> Iterator[PairBlock]:
        """Yield all other rows."""
        if self.labels is not None:
            for block, rows, logits in self._compare(anchors, self.same_class):
                yield rows, logits, *self._choose(block, logits)

    def _compare(self, anchors: Tensor, slots: Tensor | None) -> Iterator[tuple[Block, Rows, Tensor]]:
        """Yield the rows at some slots, or at all, and their logits with the anchors."""
        assert self.queue is not None
        scaled, rows_at_once = anchors / self.temperature, block_rows(len(anchors), self.queue)
        if slots is None:
            blocks = self.queue.blocks(rows_at_once)
        else:
            blocks = (self.queue.gather(slots[i : i + rows_at_once]) for i in range(0, len(slots), rows_at_once))
        affine_map = self.queue.affine_map()
        for block in blocks:
            unit, length = unit_embeddings(affine_map(block.rows))
            constant = None if self.following is None else self.following.constant(block.slots)
            if constant is not None and can_sync(constant) and not constant.any():
                constant = None  # most blocks hold no row of the batch
            rows = Rows(unit.to(anchors.dtype), length, constant)
            yield block, rows, (rows.unit @ scaled.T).T  # a CPU multiplies faster with the rows on the left

    def _choose(self, block: Block, logits: Tensor) -> tuple[Bool[Tensor, "B b"], Bool[Tensor, "B b"]]:
        """Return which pairs count as positives, and which as negatives."""
        same = torch.zeros_like(logits, dtype=torch.bool)
        if self.labels is not None and block.labels is not None:
            same = (block.labels[:, None] == self.labels).T
        positive, negative = same & (logits < self.below), ~same & (logits > self.above)
        if (excluded := self._excluded(block)) is not None:
            positive, negative = positive & ~excluded, negative & ~excluded
        return positive, negative

    def _own_slots(self, slots: slice | Tensor) -> list[Int64[Tensor, "B"]]:
        """Return the columns of ``self_indices``, if any of them may be in the block with these slots."""
        indices = self.self_indices
        if indices is None:
            return []
        if self.own_range is not None and isinstance(slots, slice):
            lowest, highest = self.own_range
            if highest < slots.start or slots.stop <= lowest:  # as in most blocks
                return []
        return [indices] if indices.ndim == 1 else [*indices.unbind(1)]

    def _leave_out_(self, logits: Float[Tensor, "B b"], block: Block) -> None:
        """Set the logits of empty slots and of the anchors' own rows to ``NOT_COUNTED``; slots are a slice."""
        assert isinstance(block.slots, slice)
        if block.valid is not None:
            logits.masked_fill_(~block.valid, NOT_COUNTED)
        for index in self._own_slots(block.slots):
            column = index[:, None] - block.slots.start
            nearest = column.clamp(0, logits.shape[1] - 1)
            kept = logits.gather(1, nearest).masked_fill_(column == nearest, NOT_COUNTED)
            logits.scatter_(1, nearest, kept)

    def _excluded(self, block: Block) -> Bool[Tensor, "*B b"] | None:
        """Return which pairs are with an empty slot or with the anchor's own row; None if none is."""
        excluded = None if block.valid is None else ~block.valid
        indices, slots = self._own_slots(block.slots), block.slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop, device=block.rows.device)
        for index in indices:
            own = (slots[:, None] == index).T  # lies in memory as the logits do
            excluded = own if excluded is None else own | excluded
        return excluded


def unit_embeddings(rows: Float[Tensor, "b D"]) -> tuple[Float[Tensor, "b D"], Float[Tensor, "b 1"]]:
    """Divide rows, in place, by their length, and return both."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12)
    return rows.div_(length), length


def block_rows(anchors: int, queue: FeatureQueue) -> int:
    """Return the rows of a block: a CPU's caches hold it; an accelerator takes 2^23 similarities."""
    if torch.compiler.is_compiling():  # every block is unrolled
        return -(-queue.size // 8)
    if queue.rows.device.type != "cpu":
        return max(1, 2**23 // max(anchors, queue.dim))
    threads = torch.get_num_threads()
    return max(1, min(2**17 * threads // max(anchors, 1), 2**19 * threads // queue.dim))
