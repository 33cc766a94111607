"""The state of a cross-batch memory under the names of PyTorch Metric Learning (PML).

Axis legend: M queue rows, D dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from selfsup_xbn.integrations._state import assign_only, is_stored, refill, state_of
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.utils.labels import class_indices


class MemoryState:
    """The buffers and pointers of PML's class, read from a queue and assigned to it, and its state dict."""

    queue: FeatureQueue
    memory_size: int
    _assigned: Tensor | None  # all M rows that were assigned, until the next step

    @property
    def embedding_memory(self) -> Float[Tensor, "M D"]:
        """Adapted rows in the order of their slots, zero for empty slots. The host waits for the device."""
        if is_stored(self.queue):
            return self.queue.rows
        rows = self.queue.features()
        return assign_only(nn.functional.pad(rows, (0, 0, 0, self.memory_size - len(rows))))

    @embedding_memory.setter
    def embedding_memory(self, rows: Float[Tensor, "M D"]) -> None:
        if rows.dtype == torch.float64:
            self._store_as(torch.float64)
        self._refill(rows, self.queue_idx, self.has_been_filled)

    @property
    def label_memory(self) -> Int64[Tensor, "M"]:
        """Label of each slot, 0 for empty slots."""
        assert self.queue.labels is not None
        return self.queue.labels

    @label_memory.setter
    def label_memory(self, labels: Shaped[Tensor, "M"]) -> None:
        self.label_memory.copy_(class_indices(labels, self.memory_size))

    @property
    def queue_idx(self) -> int:
        """Slot of the next embedding. The host waits for the device."""
        return 0 if self.queue.written.is_meta else int(self.queue.pointer)

    @queue_idx.setter
    def queue_idx(self, slot: int) -> None:
        if not 0 <= slot < self.memory_size:
            raise ValueError(f"expected a slot in [0, {self.memory_size}), got {slot}")
        self._refill(self._all_rows(), slot, self.has_been_filled)

    @property
    def has_been_filled(self) -> bool:
        """Whether every slot is filled. The host waits for the device."""
        return not self.queue.written.is_meta and len(self.queue) == self.memory_size

    @has_been_filled.setter
    def has_been_filled(self, filled: bool) -> None:
        self._refill(self._all_rows(), self.queue_idx, filled)

    def _all_rows(self) -> Tensor:
        return self.embedding_memory if self._assigned is None else self._assigned

    def _refill(self, rows: Tensor, queue_idx: int, has_been_filled: bool) -> None:
        """Assign the state in PML's terms. Rows of empty slots are kept aside, as a later assignment may fill them."""
        rows = rows.detach().clone()
        refill(self.queue, rows, self.label_memory, queue_idx + self.memory_size * has_been_filled)
        self._assigned = rows

    def _store_as(self, dtype: torch.dtype) -> None:
        self.queue.rows = self.queue.rows.to(dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the queue with the dtype of the state dict. The rows of PML's class are taken over."""
        names = [prefix + name for name in ("embedding_memory", "label_memory")]
        if all(name in state_dict for name in names):
            rows, labels = (state_dict.pop(name) for name in names)
            filled = int((rows != 0).any(1).nonzero().max()) + 1 if rows.any() else 0
            state = state_of(self.queue, rows, labels, filled)
            state_dict.update({f"{prefix}queue.{name}": value for name, value in state.items()})
        if prefix + "queue.rows" in state_dict:
            self._store_as(state_dict[prefix + "queue.rows"].dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
