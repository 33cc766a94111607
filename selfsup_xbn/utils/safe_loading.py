"""Loading of files of ``torch.save`` without executing code."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from selfsup_xbn.utils.files import open_regular, unpacked_bytes


def read_values(path: Path) -> Any:
    """Load a file of ``torch.save`` that has tensors and plain values only, to the CPU.

    Code in the file is not executed. A compressed archive, which ``torch.save`` does not write, is refused, because a
    small one may unpack to more memory than is available.

    Args:
        path: File to load.

    Raises:
        Exception: The file has other content. The type of the exception depends on the content.
    """
    with open_regular(path) as file, warnings.catch_warnings():
        size = os.fstat(file.fileno()).st_size
        if (unpacked := unpacked_bytes(file)) > size:
            raise ValueError(f"expected an archive without compression, got {size} bytes that unpack to {unpacked}")
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # an error follows
        return torch.load(file, map_location="cpu", weights_only=True)
