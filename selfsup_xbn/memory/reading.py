"""How the rows of a queue are read: in blocks of stored rows, decoded by the queue's affine map.

Axis legend: B queries, M queue rows, D dimensions, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.memory.moments import PIECE, AffineMap
from selfsup_xbn.utils.checks import check_tensors, whole_numbers
from selfsup_xbn.utils.labels import class_indices


class Block(NamedTuple):
    """Some slots of a queue: stored rows z (a view, for a slice of slots), labels, and which are filled (None: all)."""

    slots: slice | Int64[Tensor, "b"]
    rows: Float[Tensor, "b D"]
    labels: Int64[Tensor, "b"] | None
    valid: Bool[Tensor, "b"] | None

    @staticmethod
    def of(slots: slice | Tensor, rows: Tensor, labels: Tensor | None, filled: Tensor | None) -> Block:
        """Return the block at these slots of a queue's rows, labels and marks of filled slots."""
        return Block(slots, rows[slots], *(None if values is None else values[slots] for values in (labels, filled)))


def check_sizes(size: int, dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Check the arguments of a queue, and return size and dim as Python integers.

    Raises:
        UserError: a size that is not a whole number, no rows, no dimensions, or a dtype that is not floating point.
    """
    size, dim = whole_numbers(size=size, dim=dim)
    if size < 1 or dim < 1:
        raise UserError(f"expected a queue of at least 1 row and 1 dimension, got size={size}, dim={dim}")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"expected a floating point dtype of torch for the queue's rows, got {dtype}")
    return size, dim


def check_batch(batch: Tensor, dim: int) -> None:
    """Check the shape and the dtype of a batch.

    Raises:
        TypeError: the batch is not a tensor.
        ValueError: the batch is not [B, dim] with B > 0, or it is not floating point.
    """
    check_tensors(batch=batch)
    if batch.ndim != 2 or batch.shape[1] != dim or len(batch) == 0:
        raise ValueError(f"expected a batch of shape [B, {dim}], got {list(batch.shape)}")
    if not batch.is_floating_point():
        raise ValueError(f"expected a floating point batch, got {batch.dtype}")


def check_update(batch: Tensor, dim: int) -> None:
    """Check a batch that changes the queue.

    Raises:
        ValueError: as in ``check_batch``.
        RuntimeError: the call is within a backward pass, where ``torch.utils.checkpoint`` computes a step a second time
            and the queue would change twice for one batch.
    """
    check_batch(batch, dim)
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "expected each batch once, got a batch that torch.utils.checkpoint computes again in the backward pass: "
            "checkpoint the encoder alone, and call the queue or the loss outside of it"
        )


def check_labels(labels: Tensor | None, kept: bool, rows: int) -> Int64[Tensor, "B"] | None:
    """Return the labels of a batch as int64, or None for a queue that keeps none.

    Raises:
        ValueError: labels without a queue that keeps them or the reverse, or labels that are not B whole numbers.
    """
    if (labels is not None) != kept:
        raise ValueError("expected labels if, and only if, the queue was made with labels=True")
    return None if labels is None else class_indices(labels, rows)


@torch.no_grad()
def nearest_rows(
    blocks: Callable[[int], Iterator[Block]], affine_map: AffineMap, queries: Float[Tensor, "B D"]
) -> Float[Tensor, "B D"]:
    """Return, for each query, the filled row of largest cosine similarity (NNCLR, arXiv 2104.14548).

    Rows are adapted and not normalized. An empty queue returns the queries.

    Args:
        blocks: yields the queue in blocks of at most so many rows.
        affine_map: the map from stored rows to embeddings.
        queries: rows of any length.

    Raises:
        ValueError: as in ``check_batch``.

    Example:
        >>> from selfsup_xbn import FeatureQueue
        >>> queue = FeatureQueue(4, 2, "xbm")
        >>> slots = queue.enqueue(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> queue.nearest(torch.tensor([[0.1, 0.9]]))
        tensor([[0., 3.]])
    """
    check_batch(queries, len(affine_map.scale))
    nearest = queries.detach().to(affine_map.scale.dtype)
    unit, best = F.normalize(nearest, dim=1), nearest.new_full((len(nearest), 1), -torch.inf)
    for block in blocks(max(1, PIECE // max(queries.shape))):
        embeddings = affine_map(block.rows)
        cosine = unit @ F.normalize(embeddings, dim=1).T
        if block.valid is not None:
            cosine.masked_fill_(~block.valid, -torch.inf)
        largest, column = cosine.max(dim=1, keepdim=True)
        nearest = torch.where(largest > best, embeddings[column[:, 0]], nearest)
        best = torch.maximum(largest, best)
    return nearest
