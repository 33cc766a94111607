"""What depends on the device: the precision of statistics, and whether the host may read values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def can_sync(tensor: Tensor) -> bool:
    """Return whether the host reads values without waiting: on a CPU, and not in compiled code."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def can_refresh(tensor: Tensor) -> bool:
    """Return whether the host sees each step: not in compiled code, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device without it (Apple MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


class FixedPrecision(nn.Module):
    """A module that moves with its model and keeps its dtypes: ``model.half()`` must not round the moments."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedPrecision:
        def move(tensor: Tensor) -> Tensor:
            device = fn(tensor.new_empty(0, dtype=torch.float32)).device
            tensor = tensor.to(statistics_dtype(device)) if tensor.dtype == torch.float64 else tensor
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self
