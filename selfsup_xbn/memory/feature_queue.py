"""The memory: past embeddings whose moments are moved to a target at each step, at a cost free of their number.

XBN (Eq. 6 of arXiv 2303.17127) moves all M rows of a queue R to the moments of the batch B::

    R <- (R - mean(R)) / std(R) * std(B) + mean(B)

The map is the same affine for every row, so no row is touched: it is composed onto the frame in which the rows are
read (``ring``), which also tells their moments. A step costs O(B D) however large M is.

Axis legend: B batch, M queue rows, D dimensions.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from selfsup_xbn.memory.adaptation import Adaptation, Moments, batch_moments, make_adaptation
from selfsup_xbn.memory.queue_parts import Block as Block
from selfsup_xbn.memory.queue_parts import Frame, Trace, assign_, may_wait
from selfsup_xbn.memory.ring import Ring


class FeatureQueue(Ring):
    """First-in-first-out memory of M embeddings, adapted to each batch.

    A step in the paper's order is ``adapt(batch)``, ``slots = enqueue(batch, labels)``, then a loss of
    the batch against the queue with each anchor's own slot left out. All state is in ``state_dict()``.

    Args:
        size: number of rows M.
        dim: dimensions D of an embedding.
        adaptation: ``"xbm"``, ``"xbn"``, ``"axbn"`` or an instance such as ``AXBN(r=1.0)``, of which a copy is kept.
        labels: keep an int64 label for each row.
        dtype: storage of the rows; float32, bfloat16, float16 or float64. Statistics are float64 at all times, and
            neither autocast nor ``module.half()`` changes either.
        device: where the queue lives; ``.to(device)`` moves it.

    Raises:
        UserError: a size or dim below 1, or a name that is no adaptation.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        adaptation: str | Adaptation = "xbn",
        *,
        labels: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(size, dim, labels=labels, dtype=dtype, device=device)
        self.trace: Trace | None = None
        self.adaptation = make_adaptation(adaptation).to(device)
        self.adaptation.reset(dim)

    @torch.no_grad()
    def adapt(self, batch: Float[Tensor, "B D"]) -> None:
        """Moves the queue's moments to the target that the adaptation makes of the batch (Eqs. 6 and 23).

        Nothing moves for a batch of one row, a queue of fewer than two, or a batch that is not finite. A dimension
        that is constant in the queue or in the target is shifted, not scaled.
        """
        self._check(batch)
        if len(batch) < 2:
            return
        observed = batch_moments(batch)
        finite = observed.std.sum() < torch.inf  # not so for NaN
        target = self.adaptation(observed, len(batch), finite)
        before = self.moments()
        move = self._move(before, target, finite) if self.adaptation.moves_queue else None
        self.trace = Trace(observed, before, move)

    @torch.no_grad()
    def enqueue(self, batch: Float[Tensor, "B D"], labels: Int64[Tensor, "B"] | None = None) -> Int64[Tensor, "B"]:
        """Writes the batch over the oldest rows; of a batch larger than M the last M rows are kept.

        A batch with a non-finite value is left out as a whole and counted in ``skipped``.

        Returns:
            The slot of each row of the batch, -1 for a row that was not kept.
        """
        self._check(batch, labels)
        if labels is not None and labels.is_floating_point():
            raise ValueError(f"expected whole numbers as labels, got {labels.dtype}")
        if (labels is None) != (self.labels is None):
            raise ValueError("expected labels if, and only if, the queue was made with labels=True")
        surplus = max(0, len(batch) - self.size)
        values = batch.detach()[surplus:]
        labels = None if labels is None else labels[surplus:].to(self.rows.device)
        allowed = batch[:surplus].isfinite().all() if surplus else None
        slots = self._write(values, labels, allowed)
        return torch.cat([slots.new_full((surplus,), -1), slots]) if surplus else slots

    def reset(self) -> None:
        """Empties the queue and forgets what its adaptation observed."""
        super().reset()
        self.adaptation.reset(self.dim)

    def _move(self, current: Moments, target: Moments, finite: Bool[Tensor, ""]) -> Frame | None:
        """Composes the map that takes the current moments to the target onto the frames; None: nothing was moved."""
        # The next turn starts in the frame of these moments; so does this one if the queue is empty.
        if may_wait(self.rows):
            if not finite:
                return None
            torch.stack([target.std, target.mean], out=self.frames[2])
            if (count := int(self.count)) < 2:
                if count == 0:
                    self.frames[0] = torch.stack(self._next_frame())
                return None
            move = _map_between(current, target)
        else:
            assign_(self.frames[2], torch.stack([target.std, target.mean]), finite)
            assign_(self.frames[:2], torch.stack(self._next_frame()), finite & (self.count == 0))
            allowed = finite & (self.count >= 2)
            scale, shift = _map_between(current, target)
            move = Frame(torch.where(allowed, scale, 1.0), torch.where(allowed, shift, 0.0))
        frames = self.frames[:2]
        frames.mul_(move.scale)[:, 1].add_(move.shift)
        return move


def _map_between(current: Moments, target: Moments) -> Frame:
    """The map from rows of the current moments to rows of the target's; a shift alone where either is constant."""
    constant = current.constant().logical_or_(target.constant())
    factor = (target.std / current.std).masked_fill_(constant, 1)
    return Frame(factor, torch.addcmul(target.mean, factor, current.mean, value=-1))
