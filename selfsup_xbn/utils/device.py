"""The device that a run computes on."""

from __future__ import annotations

import torch

from selfsup_xbn.errors import UserError
from selfsup_xbn.utils.distributed import launched, local_rank


def device_of(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is CUDA where there is one, else the CPU.

    Of several processes that torchrun started on a machine, each has the CUDA device of its local rank, which becomes
    torch's current one.

    Raises:
        UserError: no such device, or not on this machine, or one without float64, which the queue's moments need.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and launched() > 1:
        if device.index is not None:
            raise UserError(f"--device {name}: each of {launched()} processes takes its own device; give cuda")
        device = torch.device("cuda", local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu")
    if device.type == "cuda" and launched() > 1:
        torch.cuda.set_device(device)
    return device
