"""State of a queue under the names that the replaced classes give it: rows and pointers that programs read and assign.

Axis legend: M queue rows, D dimensions, n filled rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.utils.labels import class_indices


class AssignOnly(Tensor):
    """A tensor that is computed when it is read. A change in place would be lost, and raises."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and name[-2:] != "__")
        if in_place and args and isinstance(args[0], cls) and name != "requires_grad_":
            raise RuntimeError(
                f"expected an assignment of the whole tensor, such as memory.name = rows, got {name}: this tensor is a "
                'copy of the adapted rows or of a pointer (adaptation="xbm" gives the rows themselves)'
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def assign_only(tensor: Tensor) -> Tensor:
    """Return the tensor as one that refuses changes in place."""
    return tensor.as_subclass(AssignOnly)


def is_stored(queue: FeatureQueue) -> bool:
    """Return whether the stored rows are the embeddings themselves, so that a change in place is kept."""
    return not queue.adaptation.moves_queue and queue.rows.dtype in (torch.float32, torch.float64)


@torch.no_grad()
def refill(queue: FeatureQueue, rows: Float[Tensor, "M D"], labels: Tensor | None, written: int) -> None:
    """Replace the rows of a queue, in place. The state of its adaptation and the count of skipped batches remain.

    Args:
        queue: the queue.
        rows: embeddings in the order of their slots.
        labels: class of each row; None for a queue without labels.
        written: number of rows that were ever written: the first min(written, M) slots are filled, and the next
            embedding takes slot written % M.

    Raises:
        ValueError: the shapes do not fit, or a filled row is not finite.
    """
    if rows.shape != queue.rows.shape:
        raise ValueError(f"expected rows of shape {[*queue.rows.shape]}, got {[*rows.shape]}")
    rows, filled = rows.detach().to(queue.rows.device, copy=True), min(written, queue.size)
    if not rows[:filled].isfinite().all():
        raise ValueError("expected rows without NaN or infinity")
    labels = None if labels is None else class_indices(labels, queue.size).clone()
    kept = copy.deepcopy(queue.adaptation.state_dict()), queue.skipped.clone()
    queue.reset()
    if filled:
        queue.enqueue(rows[:filled], None if labels is None else labels[:filled])
    if queue.labels is not None and labels is not None:
        queue.labels.copy_(labels)
    queue.adaptation.load_state_dict(kept[0])
    queue.skipped.copy_(kept[1])
    queue.written.fill_(written)


def state_of(
    queue: FeatureQueue, rows: Float[Tensor, "M D"], labels: Shaped[Tensor, "M"] | None, written: int
) -> dict[str, Any]:
    """Return the state dict of a queue as the given one, with the number, the size and the dtype of other rows."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    size, dim = rows.shape
    other = FeatureQueue(size, dim, queue.adaptation, labels=labels is not None, dtype=dtype, device=rows.device)
    other.adaptation.reset()
    refill(other, rows, labels, written)
    return other.state_dict()
