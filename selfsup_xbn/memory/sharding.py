"""A queue whose rows are shared out among the processes of a distributed run, for memories larger than one device.

Axis legend: B batch, M rows of all processes, D dimensions, m rows of this process.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch import distributed as dist

from selfsup_xbn.errors import UserError
from selfsup_xbn.memory.adaptation import Adaptation
from selfsup_xbn.memory.device import can_refresh
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.moments import Moments, power_sums
from selfsup_xbn.memory.reading import check_labels, check_sizes, check_update
from selfsup_xbn.utils.distributed import all_sum, peers, rank, shard_slice, world


class ShardedQueue(FeatureQueue):
    """A ``FeatureQueue`` of M rows, of which each process stores m = M / n consecutive ones.

    Every process calls ``adapt`` and ``enqueue`` with the same batch. Affine map, moments and counters are those of the
    whole queue, and the same on all processes. All else refers to the rows of this process: ``size``, ``len``,
    ``features``, ``blocks``, ``nearest``, and the slots that ``enqueue`` returns, which are -1 for rows that another
    process stores. The losses of ``selfsup_xbn.losses`` combine the processes.

    ``state_dict`` has the rows of all processes on process 0, and is that of a ``FeatureQueue`` of M rows. All
    processes must call it.

    Args:
        size: Number of rows M.
        dim: As for ``FeatureQueue``, as are the other arguments.
        adaptation: As for ``FeatureQueue``.
        labels: As for ``FeatureQueue``.
        dtype: As for ``FeatureQueue``.
        device: As for ``FeatureQueue``.

    Attributes:
        implementation: ``"torch"``. The Triton kernels do not combine the processes.
        total: Number of rows M.
        first: Slot of the first row of this process in the whole queue.

    Example:
        >>> queue = ShardedQueue(8, 2, "xbm")  # with one process, a FeatureQueue
        >>> queue.enqueue(torch.ones(3, 2))
        tensor([0, 1, 2])
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
        size, dim = check_sizes(size, dim, dtype)
        own = shard_slice(size)
        super().__init__(own.stop - own.start, dim, adaptation, labels=labels, dtype=dtype, device=device)
        self.total, self.first = size, own.start
        self.implementation = "torch"  # the Triton kernels adapt a queue to the rows of this process alone

    @torch.no_grad()
    def enqueue(self, batch: Float[Tensor, "B D"], labels: Shaped[Tensor, "B"] | None = None) -> Int64[Tensor, "B"]:
        """Write the batch over the oldest rows, as ``FeatureQueue.enqueue`` does.

        Returns:
            The slot of each row of the batch in this process, -1 for a row that it does not store.

        Raises:
            UserError: The batch has more than M / n rows.
        """
        check_update(batch, self.dim)
        labels = check_labels(labels, self.labels is not None, len(batch))
        if len(batch) > self.total // world():
            raise UserError(
                f"expected at most {self.total // world()} rows, those of a process, in a batch, got {len(batch)}"
            )
        if can_refresh(self.rows):
            if self._offered >= self.total:
                self.refresh()
            self._offered += len(batch)
        stored = self._map.inverse(batch.detach()).to(self.rows.dtype)
        entering = power_sums(stored, self.sums.dtype)
        finite = entering.sum() < torch.inf
        slots, row, held = self._destinations(len(batch))
        held = held & finite
        replaced = self.rows.index_select(0, slots)
        if self.adaptation.moves_queue:
            leaving = all_sum(power_sums(torch.where(held[:, None], replaced, 0.0), self.sums.dtype))
            self.sums.add_(torch.where(finite, entering - leaving, 0.0))
        self.rows.index_copy_(0, slots, torch.where(held[:, None], stored[row], replaced))
        if self.labels is not None and labels is not None:
            own_labels = torch.where(held, labels.to(self.labels.device)[row], self.labels[slots])
            self.labels.index_copy_(0, slots, own_labels)
        self.written.add_(finite * len(batch))
        self.skipped.add_(~finite)
        self.offered.add_(len(batch))
        beyond = slots.new_full((len(batch) + 1,), -1)
        return beyond.scatter_(0, torch.where(held, row, len(batch)), slots)[:-1]

    def _destinations(self, batch_size: int) -> tuple[Int64[Tensor, "B"], Int64[Tensor, "B"], Bool[Tensor, "B"]]:
        """Return B slots of this process, the row of the batch for each, and whether the row is for that slot."""
        start = self.written.remainder(self.total) - self.first
        start = torch.where((start >= 0) & (start < self.size), start, 0)
        slots = (start + torch.arange(batch_size, device=self.rows.device)).remainder_(self.size)
        row = (slots + self.first - self.written).remainder_(self.total)
        return slots, row.clamp(max=batch_size - 1), row < batch_size

    @torch.no_grad()
    def refresh(self) -> None:
        """Standardize the stored rows and sum them again, as ``FeatureQueue.refresh`` does."""
        super().refresh()
        if self.adaptation.moves_queue:
            self.sums.copy_(all_sum(self.sums))

    def __len__(self) -> int:
        """Return the number of filled rows of this process. Waits for the device."""
        return min(max(int(self.written) - self.first, 0), self.size)

    @property
    def pointer(self) -> Int64[Tensor, ""]:
        """The slot of the whole queue that is written next."""
        return self.written % self.total

    def _stored_moments(self) -> Moments:
        sums = self.sums if self.adaptation.moves_queue else all_sum(power_sums(self.rows, self.sums.dtype))
        return Moments.from_power_sums(sums, self.written.clamp(max=self.total))

    def _filled(self) -> Bool[Tensor, "M"]:
        return torch.arange(self.size, device=self.rows.device) < self.written - self.first

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("rows", "labels"):
            if prefix + name in destination:
                destination[prefix + name] = self._whole(destination[prefix + name])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("rows", "labels"):
            if len(values := state_dict.get(prefix + name, ())) == self.total:
                state_dict[prefix + name] = values[self.first : self.first + self.size]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _whole(self, values: Tensor) -> Tensor:
        """Return, on process 0, the values of all processes in CPU memory; on the others, their values."""
        if world() == 1:
            return values
        shards = [shard_slice(self.total, (r, world())) for r in range(world())]
        padded = values.new_zeros(-(-self.total // world()), *values.shape[1:], device="cpu")
        padded[: len(values)] = values.cpu()
        pieces = [torch.empty_like(padded) for _ in shards] if rank() == 0 else None
        with peers():
            as_bytes = None if pieces is None else [piece.view(torch.uint8) for piece in pieces]
            dist.gather(padded.view(torch.uint8), as_bytes, dst=0)
        if pieces is None:
            return values
        return torch.cat([piece[: shard.stop - shard.start] for piece, shard in zip(pieces, shards, strict=True)])
