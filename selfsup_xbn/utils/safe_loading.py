"""Loading of files of ``torch.save`` without executing code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch


def read_values(source: Path | BinaryIO) -> Any:
    """Load a file of ``torch.save`` that has tensors and plain values only, to the CPU.

    Code in the file is not executed.

    Args:
        source: Path of the file, or the open file.

    Raises:
        Exception: The file has other content. The type of the exception depends on the content.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # an error follows
        return torch.load(source, map_location="cpu", weights_only=True)
