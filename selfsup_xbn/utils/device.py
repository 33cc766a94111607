"""Selection of the device."""

from __future__ import annotations

import torch

from selfsup_xbn.errors import UserError
from selfsup_xbn.utils.launch import launched, local_rank


def device_of(name: str) -> torch.device:
    """Return the device with a name.

    In a distributed run each process gets the CUDA device of its local rank, which becomes the current device.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"`` for CUDA if available and the CPU otherwise.

    Raises:
        UserError: The name is invalid, the device does not exist, or it is neither a CPU nor a CUDA device. The moments
            of the queue require float64, which other devices lack.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and launched() > 1:
        if device.index is not None:
            raise UserError(
                f"--device: expected cuda in a run of {launched()} processes, which use one device each, got {name}"
            )
        device = torch.device("cuda", local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices: use --device cpu")
    if device.type == "cuda" and launched() > 1:
        torch.cuda.set_device(device)
    return device
