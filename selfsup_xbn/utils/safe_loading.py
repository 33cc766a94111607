"""Loading of files of ``torch.save`` without executing code."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch

from selfsup_xbn.utils.files import open_regular, unpacked_bytes


def read_values(source: Path | BinaryIO, lazily: bool = False) -> Any:
    """Load a file of ``torch.save`` that has tensors and plain values only, to the CPU.

    Code in the file is not executed. A compressed archive, which ``torch.save`` does not write, is refused, because a
    small one may unpack to more memory than is available.

    Args:
        source: Path of the file, or the open file.
        lazily: Whether to map the tensors of a path into memory, so that only those that are used are read.

    Raises:
        Exception: The file has other content. The type of the exception depends on the content.
    """
    opened = open_regular(source) if isinstance(source, Path) else contextlib.nullcontext(source)
    with opened as file, warnings.catch_warnings():
        size = file.seek(0, os.SEEK_END)
        if (unpacked := unpacked_bytes(file)) > size:
            raise ValueError(f"expected an archive without compression, got {size} bytes that unpack to {unpacked}")
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # an error follows
        return torch.load(str(source) if lazily else file, map_location="cpu", weights_only=True, mmap=lazily)
