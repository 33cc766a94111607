"""Files of ``torch.save``, read without running code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch


def read_values(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU, as long as it is tensors and plain values; no code in the file is run.

    Raises:
        Exception: nearly any, if the file holds something else.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # a refusal follows, and is one line
        return torch.load(path, map_location="cpu", weights_only=True)
