"""What depends on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def can_sync(tensor: Tensor) -> bool:
    """Return whether the host reads values without waiting: on a CPU, and not in compiled code."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
