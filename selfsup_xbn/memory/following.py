"""How adapted rows follow the batch: the gradient that a memory of constants lacks.

XBN writes a row R as ``(R - mean(R)) / std(R) * std(B) + mean(B)`` (Eq. 6 of arXiv 2303.17127). The row is therefore a
function of the batch's moments m and s, and through them of each embedding of the batch::

    R' = (R - sg(m)) * s / sg(s) + m        sg: stop-gradient

has the value of R, and its gradient by m and s. The rows of the batch itself, which are in the queue too, are
constants.

Axis legend: N rows that the queue was adapted to, M queue rows, D dimensions, b rows of a block.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.moments import AffineMap, Moments
from selfsup_xbn.memory.reading import check_batch
from selfsup_xbn.memory.sharding import ShardedQueue


class Following:
    """The rows of a queue as functions of the batch that the queue was adapted to, and that it took, last.

    Args:
        queue: the queue, after ``adapt`` and ``enqueue``.
        batch: what both were called with, with its graph.

    Attributes:
        map: the identity, through which gradient flows to the batch (R' above).

    Raises:
        UserError: the adaptation does not move rows to the moments of the batch, or the queue is sharded.
        ValueError: the batch is not [N, D].

    Example:
        >>> queue, batch = FeatureQueue(4, 1, "xbn"), torch.tensor([[1.0], [3.0]], requires_grad=True)
        >>> for values in (torch.tensor([[0.0], [1.0]]), batch):
        ...     queue.adapt(values)
        ...     slots = queue.enqueue(values)
        >>> rows = Following(queue, batch).rows(queue.features(), torch.arange(4))
        >>> rows[:, 0].tolist()
        [1.0, 3.0, 1.0, 3.0]
        >>> rows.sum().backward()  # the two old rows move as the mean of the batch does
        >>> batch.grad[:, 0].tolist()
        [1.0, 1.0]
    """

    def __init__(self, queue: FeatureQueue, batch: Float[Tensor, "N D"]) -> None:
        check_follows(queue)
        check_batch(batch, queue.dim)
        self.size, self.taken = queue.size, min(len(batch), queue.size)
        self.before = queue.written - self.taken  # rows written before the batch
        self.alone = self.before == 1 if len(batch) > 1 else torch.ones_like(self.before, dtype=torch.bool)
        self.map = _identity_through(batch)

    def constant(self, slots: slice | Int64[Tensor, "b"]) -> Bool[Tensor, "b"]:
        """Return which of the rows at these slots do not follow the batch: its own, which it did not move.

        Nothing moves for a batch or a queue of one row.
        """
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop, device=self.before.device)
        of_batch = (slots - self.before).remainder_(self.size) < self.taken
        return of_batch.logical_or_(self.alone)

    def rows(self, rows: Float[Tensor, "b D"], slots: slice | Int64[Tensor, "b"]) -> Float[Tensor, "b D"]:
        """Return the adapted rows at these slots, with their gradient by the batch."""
        return torch.where(self.constant(slots)[:, None], rows, self.map(rows).to(rows.dtype))


def check_follows(queue: FeatureQueue) -> None:
    """Check that rows of a queue are functions of the batch.

    Raises:
        UserError: the adaptation does not move rows to the moments of the batch, or the queue is sharded.
    """
    if not queue.adaptation.follows_batch:
        raise UserError(
            "the moment gradient: expected an adaptation that moves the rows to the moments of the batch, as xbn does, "
            f"got {type(queue.adaptation).__name__}, whose rows do not follow the batch"
        )
    if isinstance(queue, ShardedQueue):
        raise UserError("the moment gradient: expected a queue that is not sharded")


def features(queue: FeatureQueue, adapted_to: Float[Tensor, "N D"] | None) -> Float[Tensor, "n D"]:
    """Return the filled rows, adapted, with their gradient by the batch if it is given. Waits for the device."""
    rows = queue.features()
    return rows if adapted_to is None else Following(queue, adapted_to).rows(rows, slice(0, len(rows)))


def _identity_through(batch: Float[Tensor, "N D"]) -> AffineMap:
    """Return the map R -> (R - sg(m)) * s / sg(s) + m. A dimension that is constant in the batch is not scaled."""
    rows = batch.to(torch.promote_types(batch.dtype, torch.float32))
    mean = rows.mean(0)
    variance = (rows - mean).square().sum(0) / max(len(rows) - 1, 1)
    constant = Moments(mean.detach(), variance.detach().sqrt()).constant()
    std = variance.masked_fill(constant, 1).sqrt()
    scale = std / std.detach()
    return AffineMap(scale, mean - mean.detach() * scale)
