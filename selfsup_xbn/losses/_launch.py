"""What the launches of both losses share: sizes, and the tensors that they read and write.

Axis legend: B anchors, M queue rows, D dimensions, E own rows of an anchor.
"""

from __future__ import annotations

import math

import torch
import triton
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.losses.pairs import Pairs
from selfsup_xbn.memory.feature_queue import FeatureQueue

LOG2E = math.log2(math.e)


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; 4 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def queue_of(pairs: Pairs) -> FeatureQueue:
    """Return the queue, which the kernels are not called without."""
    assert pairs.queue is not None
    return pairs.queue


def padded(dim: int) -> int:
    """Return the power of two that a tile has for the dimensions."""
    return max(16, triton.next_power_of_2(dim))


def is_exact() -> bool:
    """Return whether products have the precision of float32."""
    return torch.get_float32_matmul_precision() == "highest"


def split(M: int, rows: int, parts: int) -> tuple[int, int]:
    """Return the number of parts of a queue of M rows, at most ``parts``, and the length of a part in whole tiles."""
    part = triton.cdiv(triton.cdiv(M, max(1, parts)), rows) * rows
    return triton.cdiv(M, part), part


def parts_at_a_time(parts: int, dim: int) -> int:
    """Return how many parts' sums a program loads at a time."""
    return min(triton.next_power_of_2(parts), max(1, 2**13 // padded(dim)))


def empty(like: Tensor, *shape: int) -> Float[Tensor, "..."]:
    """Return a float32 tensor on the device of another one."""
    return like.new_empty(shape, dtype=torch.float32)


def own_rows(pairs: Pairs) -> Int64[Tensor, "B *E"] | None:
    """Return the slots that each anchor does not meet, row by row in memory."""
    return None if pairs.self_indices is None else pairs.self_indices.contiguous()


def rows_per_anchor(own: Int64[Tensor, "B *E"] | None, B: int) -> int:
    """Return E."""
    return 0 if own is None else own.numel() // B
