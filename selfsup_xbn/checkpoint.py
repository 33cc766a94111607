"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from selfsup_xbn.errors import UserError

NAME, BEST = "checkpoint.pt", "best.pt"


def save(state: dict[str, Any], folder: Path, name: str = NAME) -> None:
    """Writes a checkpoint atomically: to a temporary file, flushed to the disk, then renamed over the old one."""
    temporary = folder / (name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / name)


def load(folder: Path, name: str = NAME) -> dict[str, Any]:
    """The state in a run's checkpoint, on the CPU; a pickle that would run code is refused.

    Raises:
        UserError: there is none, it is damaged, or it is none of this package's.
    """
    path = folder / name
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; give the folder of a run") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        kind = type(error).__name__
        raise UserError(
            f"cannot read {path} ({kind}): it is damaged, or holds more than tensors and plain values"
        ) from None
    if not isinstance(state, dict) or "method" not in state or "config" not in state:
        raise UserError(f"{path} is no checkpoint of this program: give the folder of a run, or --weights FILE")
    return state
