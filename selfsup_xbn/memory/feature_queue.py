"""The memory: past embeddings whose moments are moved to a target at each step, in time that does not depend on M.

XBN (Eq. 6 of arXiv 2303.17127) moves all M rows of a queue R to the moments of the batch B::

    R <- (R - mean(R)) / std(R) * std(B) + mean(B)

It is the same affine map for every row, so no row is rewritten: a stored row z stands for ``z * scale + shift``.

- ``adapt`` composes Eq. 6 onto (scale, shift), O(D). The moments of the queue come from power sums of z.
- ``enqueue`` writes the batch over the oldest rows and changes the sums by the rows that come and go, O(B D).
- ``refresh`` standardizes the stored rows and sums them again, O(M D), once per pass of the ring (M / B steps): scale
  stays near 1, and no rounding error outlives a pass.

Axis legend: B batch, M queue rows, D dimensions, n filled rows, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from selfsup_xbn.memory.adaptation import Adaptation, make_adaptation
from selfsup_xbn.memory.device import FixedPrecision, can_refresh, can_sync, queue_kernels, statistics_dtype
from selfsup_xbn.memory.moments import PIECE, AdaptRecord, AffineMap, Moments, batch_moments, power_sums
from selfsup_xbn.memory.reading import Block, check_labels, check_sizes, check_update, nearest_rows


class FeatureQueue(FixedPrecision):
    """First-in-first-out memory of M embeddings, adapted to each batch (Eqs. 6 and 23 of arXiv 2303.17127).

    A step is ``adapt``, ``enqueue``, and a loss of the batch against the queue with each anchor's own slot left out. It
    never waits for the device, and it can be compiled (``fullgraph=True``) or captured as a CUDA graph. ``enqueue``
    calls ``refresh`` once per pass; the owner of a compiled or captured step calls it every M / B steps.

    Args:
        size: number of rows M.
        dim: dimensions D of an embedding.
        adaptation: "xbm", "xbn", "axbn", or an instance such as ``AXBN(r=1.0)``, which is copied.
        labels: keep an int64 label for each row.
        dtype: storage of the rows. Statistics are float64 (float32 on MPS). ``module.half()`` changes neither.
        device: where the queue is created; ``.to(device)`` moves it.

    Attributes:
        rows: stored rows z [M, D]; ``features()`` returns the embeddings.
        written, offered: rows written since the last reset, and rows passed to ``enqueue`` since the last refresh.
        skipped: batches left out because a value was not finite.
        recording, record: where ``recording`` is True, each ``adapt`` leaves an ``AdaptRecord`` in ``record``.
        implementation: "torch", "triton", or "auto": Triton kernels on a GPU for "xbm", "xbn" and "axbn".

    Raises:
        UserError: size or dim is not a whole number of at least 1, the adaptation is neither a name nor an instance, or
            dtype is not floating point.

    Example:
        >>> queue, keys = FeatureQueue(4096, 128, "xbn"), F.normalize(torch.randn(64, 128), dim=1)
        >>> queue.adapt(keys)
        >>> queue.enqueue(keys)[-1].item(), len(queue)
        (63, 64)
    """

    rows: Tensor
    labels: Tensor | None
    sums: Tensor
    written: Tensor
    offered: Tensor
    skipped: Tensor
    record: AdaptRecord | None

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
        super().__init__()
        size, dim = check_sizes(size, dim, dtype)
        self.size, self.dim = size, dim
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64, device=device) if labels else None)
        statistics = statistics_dtype(self.rows.device)
        for name, value in AffineMap.identity(dim, statistics, device)._asdict().items():
            self.register_buffer(name, value)
        self.register_buffer("sums", power_sums(self.rows[:0], statistics))
        for name in ("written", "offered", "skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("ticket", torch.zeros((), dtype=torch.int32, device=device), persistent=False)
        self._offered = 0  # the host's copy of ``offered``: rows that came since the last refresh
        self.adaptation = make_adaptation(adaptation)
        self.adaptation.allocate(dim, statistics, device)
        self.adaptation.to(device)
        self.recording, self.record, self.implementation = False, None, "auto"

    @torch.no_grad()
    def adapt(self, batch: Float[Tensor, "B D"]) -> None:
        """Move the queue's moments to the target that the adaptation returns for the batch (Eqs. 6 and 23).

        Nothing moves for a batch or a queue of one row, or a batch with a non-finite value. A dimension that is
        constant in the queue or in the target is shifted and not scaled. The first rows are stored standardized.
        """
        check_update(batch, self.dim)
        before = self.moments() if self.recording and len(batch) > 1 else None
        moves = self.adaptation.moves_queue and len(batch) > 1
        if moves and (kernels := queue_kernels(self, batch)):
            kernels.adapt(self, batch)
        elif moves:
            observed = batch_moments(batch, self.sums.dtype)
            finite = observed.std.sum() < torch.inf  # False for NaN
            target = self.adaptation(observed, len(batch), finite)
            moved = AffineMap.between(self.moments(), target).after(self._map)
            self._assign_map(moved, finite & (self.written != 1))  # a single row has no spread to match
        if before is not None:
            self.record = AdaptRecord(batch_moments(batch, self.sums.dtype), before, self.moments())

    @torch.no_grad()
    def enqueue(self, batch: Float[Tensor, "B D"], labels: Shaped[Tensor, "B"] | None = None) -> Int64[Tensor, "B"]:
        """Write the batch over the oldest rows; of a batch larger than M, the last M rows.

        A batch with a non-finite value changes no row and no moment. It is counted in ``skipped``, and the next batch
        takes the slots that it would have taken.

        Returns:
            The slot of each row of the batch, -1 for a row that was not kept.
        """
        check_update(batch, self.dim)
        labels = check_labels(labels, self.labels is not None, len(batch))
        if can_refresh(self.rows):
            if self._offered >= self.size:
                self.refresh()
            self._offered += min(len(batch), self.size)
        if kernels := queue_kernels(self, batch):
            return kernels.enqueue(self, batch, labels)
        stored = self._map.inverse(batch.detach()).to(self.rows.dtype)
        lost, kept = stored[: -self.size], stored[-self.size :]
        entering = power_sums(kept, self.sums.dtype)
        finite = entering.sum() < torch.inf
        finite = finite & lost.isfinite().all() if len(lost) else finite
        slots = (self.written + torch.arange(len(kept), device=self.rows.device)).remainder_(self.size)
        replaced = self.rows.index_select(0, slots)  # zeros in a slot that was never written
        if self.adaptation.moves_queue:
            change = entering.sub_(power_sums(replaced, self.sums.dtype))
            self.sums.add_(torch.where(finite, change, 0.0))
        self.rows.index_copy_(0, slots, torch.where(finite, kept, replaced))
        if self.labels is not None and labels is not None:
            kept_labels = torch.where(finite, labels[-self.size :].to(self.labels.device), self.labels[slots])
            self.labels.index_copy_(0, slots, kept_labels)
        self.written.add_(finite * len(kept))
        self.skipped.add_(~finite)
        self.offered.add_(len(kept))
        slots = torch.where(finite, slots, -1)
        return F.pad(slots, (len(lost), 0), value=-1) if len(lost) else slots

    @torch.no_grad()
    def refresh(self) -> None:
        """Standardize the stored rows and sum them again, O(M D). The embeddings stay as they are, to rounding.

        Without it moments hold to 1e-6 for about 8 * M steps (float32 statistics: M steps): the spread of z shrinks.
        """
        self._offered = 0
        self.offered.zero_()
        if self.adaptation.moves_queue:
            standard = self._map.standardizing(self._stored_moments())
            encode, filled = standard.to(self._read_dtype), self._filled()[:, None]
            rows_at_a_time = max(1, PIECE // self.dim)
            for rows, valid in zip(self.rows.split(rows_at_a_time), filled.split(rows_at_a_time), strict=True):
                rows.copy_(torch.where(valid, encode.inverse(rows), 0.0))
            self.sums.copy_(power_sums(self.rows, self.sums.dtype))
            self._assign_map(self._map.after(standard))

    def reset(self) -> None:
        """Empty the queue and forget what its adaptation observed. No buffer is replaced."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
        self._assign_map(AffineMap.identity(self.dim, self.sums.dtype, self.sums.device))
        self._offered = 0
        self.adaptation.reset()

    def moments(self) -> Moments:
        """Return mean and unbiased standard deviation (of one row: 0) of the adapted rows, O(D); with "xbm" O(M D)."""
        return self._map.moments(self._stored_moments())

    def affine_map(self) -> AffineMap:
        """Return the present map from stored rows to embeddings, in float32, or in float64 for float64 rows."""
        return self._map.to(self._read_dtype)

    def __len__(self) -> int:
        """Return the number n of filled rows. Waits for the device."""
        return min(int(self.written), self.size)

    @property
    def pointer(self) -> Int64[Tensor, ""]:
        """The slot that is written next."""
        return self.written % self.size

    def features(self) -> Float[Tensor, "n D"]:
        """Return the filled rows, adapted, in the order of their slots. Waits for the device."""
        return self.affine_map()(self.rows[: len(self)])

    def blocks(self, block_rows: int) -> Iterator[Block]:
        """Yield the slots in blocks of at most ``block_rows``, as views of the stored rows.

        On a CPU only filled slots are read. On an accelerator and in compiled code all M slots are read, and
        ``Block.valid`` marks the filled ones.
        """
        end, filled = (len(self), None) if can_sync(self.rows) else (self.size, self._filled())
        for start in range(0, end, block_rows):
            yield Block.of(slice(start, min(start + block_rows, end)), self.rows, self.labels, filled)

    def gather(self, indices: Int64[Tensor, "b"]) -> Block:
        """Return a copy of the stored rows at these filled slots."""
        return Block.of(indices, self.rows, self.labels, None)

    def nearest(self, queries: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return, for each query, the adapted row of largest cosine similarity; see ``reading.nearest_rows``."""
        return nearest_rows(self.blocks, self.affine_map(), queries)

    def extra_repr(self) -> str:
        """Return size, dimensions and storage, for ``print(module)``."""
        return f"size={self.size}, dim={self.dim}, dtype={self.rows.dtype}, labels={self.labels is not None}"

    @property
    def _map(self) -> AffineMap:
        return AffineMap(*(getattr(self, name) for name in AffineMap._fields))

    @property
    def _read_dtype(self) -> torch.dtype:
        return torch.promote_types(self.rows.dtype, torch.float32)

    def _assign_map(self, value: AffineMap, condition: Bool[Tensor, ""] | None = None) -> None:
        for buffer, new in zip(self._map, value, strict=True):
            buffer.copy_(new if condition is None else torch.where(condition, new, buffer))

    def _stored_moments(self) -> Moments:
        sums = self.sums if self.adaptation.moves_queue else power_sums(self.rows, self.sums.dtype)
        return Moments.from_power_sums(sums, self.written.clamp(max=self.size))

    def _filled(self) -> Bool[Tensor, "M"]:
        return torch.arange(self.size, device=self.rows.device) < self.written

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load the buffers, and the host's copy of ``offered``: a resumed run refreshes at the same step."""
        super()._load_from_state_dict(*args, **kwargs)
        self._offered = 0 if self.offered.is_meta else int(self.offered)
