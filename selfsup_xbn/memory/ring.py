"""A ring of rows that are moved by one affine map for all, and whose moments are known, at a cost free of their number.

No row is rewritten when all are moved: rows are stored in a canonical frame, and the moved row is ``row * scale +
shift`` with ``scale, shift`` [D] composed anew each time. The moments are known without reading: sums over the stored
rows change only by the rows that come and go, and the frame takes their moments to those of the moved rows.

**Turns.** Composed for ever, scale would leave the range in which float32 is exact, and errors of the sums would grow
with it. So each turn of the ring has a frame of its own. Slots before the pointer were written in this turn and belong
to entry 0 of ``frames``; slots from the pointer on were written in the turn before and belong to entry 1. When the
pointer passes the end, this turn becomes the last one, whose rows are all gone by then, and a new one starts, in which
rows of the moments that wait in entry 2 are standardised (so their sums lose no digits, and bfloat16 suffices to store
them). ``totals[:, 0]`` are the sums over all rows, ``totals[:, 1]`` those over this turn's, both as this turn's frame
would store them, so that one map takes all rows to their moments. When a turn ends all rows are its own, and so their
sums start the next one. No frame and no rounding error outlives two turns, nothing is ever rewritten, and pointer,
count and all decisions stay on the device: no step waits for it.

Axis legend: B batch, M ring's rows, D dimensions, n filled rows, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from selfsup_xbn.errors import UserError
from selfsup_xbn.memory.adaptation import Moments
from selfsup_xbn.memory.queue_parts import AffineMap, Block, Frame, assign_, may_wait, power_sums


class Ring(nn.Module):
    """The last M rows that were written, with a label each if wanted. ``FeatureQueue`` says what for."""

    rows: Tensor
    labels: Tensor | None
    pointer: Tensor
    count: Tensor
    skipped: Tensor
    frames: Tensor
    totals: Tensor

    def __init__(
        self, size: int, dim: int, *, labels: bool, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise UserError(f"expected a queue of at least 1 row and 1 dimension, got size={size}, dim={dim}")
        if not dtype.is_floating_point:
            raise UserError(f"expected a floating point dtype for the queue's rows, got {dtype}")
        self.size, self.dim = size, dim
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64, device=device) if labels else None)
        for name in ("pointer", "count", "skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        identity = torch.stack([torch.ones(3, dim), torch.zeros(3, dim)], dim=1).double().to(device)
        self.register_buffer("frames", identity)  # [this, last; scale, shift; D], [next; deviation, mean; D]
        totals = torch.zeros(2, 2, dim, dtype=torch.float64, device=device)
        self.register_buffer("totals", totals)  # [1, 2 power; all rows, this turn's; D]

    def __len__(self) -> int:
        """Number of filled rows n. Waits for the device."""
        return int(self.count)

    def moments(self) -> Moments:
        """Mean and unbiased standard deviation of the adapted rows, without reading them.

        The deviation of fewer than two rows is 0, and the mean of none is any number.
        """
        n = int(self.count) if may_wait(self.rows) else self.count
        return _moments_of(self.totals[:, 0], n, self._frame(0))

    def features(self) -> Float[Tensor, "n D"]:
        """The filled rows, adapted, in the order of their slots. Waits for the device."""
        parts = [block.rows.clone() for block in self._turns(self.size)]
        return torch.cat(parts) if parts else self.rows.new_zeros(0, self.dim, dtype=self._read_dtype)

    def blocks(self, block_rows: int) -> Iterator[Block]:
        """All filled slots in blocks of at most ``block_rows``, adapted as they are read.

        On an accelerator, and when compiled, the number of filled rows is not known here without waiting: all M slots
        are read and ``valid`` says which count.
        """
        if may_wait(self.rows):
            yield from self._turns(block_rows)
            return
        turns = self._read_frames()
        for start in range(0, self.size, block_rows):
            stop = min(start + block_rows, self.size)
            slots = torch.arange(start, stop, device=self.rows.device)
            yield self._decoded(slice(start, stop), slots, turns, slots < self.count)

    def gather(self, slots: Int64[Tensor, "b"]) -> Block:
        """The rows at these slots, which must be filled."""
        return self._decoded(slots, slots, self._read_frames(), None)

    def affine_map(self) -> AffineMap:
        """The identity: blocks of rows of two turns are adapted as they are read."""
        scale = torch.ones(self.dim, dtype=self._read_dtype, device=self.rows.device)
        return AffineMap(scale, torch.zeros_like(scale))

    def reset(self) -> None:
        """Empties the ring."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
        self.frames[:, 0] = 1

    def extra_repr(self) -> str:
        """Size, dimensions and storage, for ``print(module)``."""
        return f"size={self.size}, dim={self.dim}, dtype={self.rows.dtype}, labels={self.labels is not None}"

    # --------------------------------------------------------------------------------------------------- internals

    @property
    def _read_dtype(self) -> torch.dtype:
        return torch.promote_types(self.rows.dtype, torch.float32)

    def _frame(self, turn: int) -> Frame:
        """Frame of this turn of the ring (0) or of the one before (1)."""
        return Frame(*self.frames[turn].unbind())

    def _next_frame(self) -> Frame:
        """Frame of the turn to come, in which rows of the last target moments are standardised."""
        std, mean = self.frames[2].unbind()
        return Frame(std.masked_fill(Moments(mean, std).constant(), 1), mean)

    def _labels(self, slots: slice | Int64[Tensor, "b"]) -> Int64[Tensor, "b"] | None:
        return None if self.labels is None else self.labels[slots]

    def _read_frames(self) -> Float[Tensor, "2 2 D"]:
        """Scale and shift of this turn and of the last one, in the precision that rows are read in."""
        return self.frames[:2].to(self._read_dtype)

    def _decoded(
        self,
        place: slice | Int64[Tensor, "b"],
        slots: Int64[Tensor, "b"],
        turns: Float[Tensor, "2 2 D"],
        filled: Bool[Tensor, "b"] | None,
    ) -> Block:
        """The rows at ``place``, whose slots these are, each by the frame of its turn."""
        frame = Frame(*turns[(slots >= self.pointer).long()].unbind(1))
        features = frame(self.rows[place].to(self._read_dtype))
        return Block(place, features, self._labels(place), filled)

    def _turns(self, block_rows: int) -> Iterator[Block]:
        """The filled slots, in order: this turn's, then the last one's."""
        pointer, count = int(self.pointer), int(self.count)
        dtype = self._read_dtype
        turns = self._read_frames().unbind()
        scratch = self.rows.new_empty(min(block_rows, self.size), self.dim, dtype=dtype)
        for start in range(0, count, block_rows):
            stop = min(start + block_rows, count)
            seam = min(max(pointer, start), stop)
            for (scale, shift), first, end in zip(turns, (start, seam), (seam, stop), strict=True):
                torch.addcmul(shift, self.rows[first:end], scale, out=scratch[first - start : end - start])
            slots = slice(start, stop)
            yield Block(slots, scratch[: stop - start], self._labels(slots), None)

    def _write(
        self, values: Float[Tensor, "b D"], labels: Int64[Tensor, "b"] | None, allowed: Bool[Tensor, ""] | None
    ) -> Int64[Tensor, "b"]:
        """Writes at most M rows over the oldest ones, all or, if one is not finite or ``allowed`` is false, none.

        Returns:
            The slot of each row; -1 for all if they were not written.
        """
        return (self._write_parts if may_wait(self.rows) else self._write_masked)(values, labels, allowed)

    def _write_parts(
        self, values: Float[Tensor, "b D"], labels: Int64[Tensor, "b"] | None, allowed: Bool[Tensor, ""] | None
    ) -> Int64[Tensor, "b"]:
        """``_write`` where the pointer may be looked at: the rows up to the ring's end, then those past it."""
        pointer, count = int(self.pointer), int(self.count)
        end = self.size - pointer
        parts = [self._frame(0).inverse(values[:end]).to(self.rows.dtype)]
        if len(values) > end:
            parts.append(self._next_frame().inverse(values[end:]).to(self.rows.dtype))
        sums = [power_sums(part) for part in parts]
        if not (all(entering.sum() < torch.inf for entering in sums) and (allowed is None or allowed)):
            self.skipped.add_(1)
            return torch.full((len(values),), -1)
        slots = torch.arange(pointer, pointer + len(values))
        if len(parts) > 1:
            slots.remainder_(self.size)
        if labels is not None and self.labels is not None:
            self.labels[slots] = labels
        for part, entering in zip(parts, sums, strict=True):
            place = slice(pointer, pointer + len(part))
            if count == self.size:  # the rows that were there are of the last turn
                replaced = self._frame(1).seen_from(self._frame(0))(self.rows[place].double())
                self.totals[:, 0].sub_(power_sums(replaced))
            self.totals.add_(entering[:, None])
            self.rows[place] = part
            pointer, count = place.stop % self.size, max(count, place.stop)
            if pointer == 0:
                following = self._next_frame()
                self.totals[:, 0] = _sums_seen_from(following, self._frame(0), self.totals[:, 1], self.size)
                self.totals[:, 1] = 0
                self.frames[1], self.frames[0] = self.frames[0], torch.stack(following)
        self.pointer.fill_(pointer)
        self.count.fill_(count)
        return slots

    def _write_masked(
        self, values: Float[Tensor, "b D"], labels: Int64[Tensor, "b"] | None, allowed: Bool[Tensor, ""] | None
    ) -> Int64[Tensor, "b"]:
        """``_write`` on an accelerator, where nothing may be looked at: every row of the batch in one way."""
        position = self.pointer + torch.arange(len(values), device=values.device)
        slots, next_turn = position % self.size, position >= self.size
        this, last, following = self._frame(0), self._frame(1), self._next_frame()
        stored = Frame.where(next_turn, following, this).inverse(values).to(self.rows.dtype)
        replaced = self.rows.index_select(0, slots)
        left = Frame.where(next_turn, this.seen_from(following), last.seen_from(this))(replaced.double())
        turns = torch.stack([~next_turn, next_turn])
        entering, leaving = power_sums(stored, turns), power_sums(left, turns & (slots < self.count))
        finite = entering.sum() < torch.inf
        if allowed is not None:
            finite = finite & allowed
        turned = finite & (position[-1] >= self.size - 1)

        change = entering - leaving
        # Rows up to the ring's end replace the last turn's; rows past it open the next turn and replace this one's.
        own = self.totals[:, 1] + entering[:, 0]
        stay = torch.stack([self.totals[:, 0] + change[:, 0], own], dim=1)
        started = _sums_seen_from(following, this, own, self.size) + change[:, 1]
        assign_(self.totals, torch.where(turned, torch.stack([started, entering[:, 1]], dim=1), stay), finite)
        assign_(self.frames[:2], torch.stack([torch.stack(following), self.frames[0]]), turned)
        self.rows.index_copy_(0, slots, torch.where(finite, stored, replaced))
        if labels is not None and self.labels is not None:
            self.labels.index_copy_(0, slots, torch.where(finite, labels, self.labels[slots]))
        advance = finite * len(values)
        self.pointer.add_(advance).remainder_(self.size)
        self.count.add_(advance).clamp_(max=self.size)
        self.skipped.add_(~finite)
        return torch.where(finite, slots, -1)

    def _check(self, batch: Tensor, labels: Tensor | None = None) -> None:
        if batch.ndim != 2 or batch.shape[1] != self.dim or len(batch) == 0:
            raise ValueError(f"expected a batch of shape [B, {self.dim}], got {list(batch.shape)}")
        if labels is not None and labels.shape != batch.shape[:1]:
            raise ValueError(f"expected labels of shape [{len(batch)}], got {list(labels.shape)}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Ring:
        """Moves with the model, but keeps its precision: ``model.half()`` must not round the moments."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self


def _moments_of(sums: Float64[Tensor, "2 D"], n: int | Int64[Tensor, ""], frame: Frame) -> Moments:
    """Moments of n rows that are stored in a frame, of the sums over the stored ones."""
    n = _at_least_one(n)
    first, second = sums.unbind()
    centre = first / n
    spread = torch.addcmul(second, centre, first, value=-1).clamp_(min=0).div_(_at_least_one(n - 1))
    return Moments(frame(centre), spread.sqrt_().mul_(frame.scale))


def _at_least_one(n: int | Int64[Tensor, ""]) -> int | Int64[Tensor, ""]:
    return max(n, 1) if isinstance(n, int) else n.clamp(min=1)


def _sums_seen_from(other: Frame, frame: Frame, sums: Float64[Tensor, "2 D"], n: int) -> Float64[Tensor, "2 D"]:
    """The sums over n rows that are stored in ``frame``, had they been stored in the other one."""
    mean, std = _moments_of(sums, n, frame.seen_from(other))
    return torch.stack([mean * n, (mean * mean).mul_(n).addcmul_(std, std, value=n - 1)])
