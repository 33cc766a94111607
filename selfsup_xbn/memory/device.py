"""What depends on the device: the precision of statistics, and whether the host may read values."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from selfsup_xbn.memory.feature_queue import FeatureQueue


def can_sync(tensor: Tensor) -> bool:
    """Return whether the host reads values without waiting: on a CPU, and not in compiled code."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def is_capturing(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, whose replays do not run the host's code."""
    return tensor.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def can_refresh(tensor: Tensor) -> bool:
    """Return whether the host sees each step: not in compiled code, nor while a CUDA graph is captured."""
    return not torch.compiler.is_compiling() and not is_capturing(tensor)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Return whether Triton is installed, and runs on the device: on a GPU, or elsewhere in its interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return (device.type == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None


def has_kernels(device: torch.device) -> bool:
    """Return whether Triton kernels replace PyTorch's operations: on the current GPU, of compute capability 8.0."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    if torch.version.hip or not has_triton(device):
        return False
    if not torch.cuda.is_available():  # a fake tensor
        return False
    return device.index == torch.cuda.current_device() and torch.cuda.get_device_capability(device) >= (8, 0)


def uses_kernels(implementation: str, device: torch.device) -> bool:
    """Return whether an implementation, "torch", "triton" or "auto", stands for Triton kernels on the device."""
    return has_kernels(device) if implementation == "auto" else implementation == "triton" and has_triton(device)


def queue_kernels(queue: FeatureQueue, batch: Tensor) -> Any:
    """Return the module of Triton kernels that adapt and enqueue, if they are to be used and take this batch."""
    if not uses_kernels(queue.implementation, queue.rows.device):
        return None
    from selfsup_xbn.memory import kernels

    return kernels if kernels.supports(queue, batch) else None


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
