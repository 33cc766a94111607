"""Small copies of the retrieval benchmarks in their official layouts, and ways to spoil them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.benchmarks.official_layouts import WRITERS
from selfsup_xbn.data import load_data
from selfsup_xbn.errors import UserError


def official(name: str, root: Path, scale: float, image: bytes = b"") -> str:
    """Writes a data set at a share of its official size; returns its specification."""
    WRITERS[name](root, scale, image)
    return f"{name}:{root}"


def fault(spec: str) -> str:
    """The one line that the user reads when the data set cannot be opened."""
    with pytest.raises(UserError) as caught:
        load_data(spec, workers=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(file: Path, number: int, line: str | bytes) -> str:
    """Puts ``line`` in place of line ``number``; returns FILE:LINE."""
    lines = file.read_bytes().split(b"\n")
    lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(b"\n".join(lines))
    return f"{file}:{number}"


def line_of(file: Path, number: int) -> str:
    return file.read_text().split("\n")[number - 1]


def photo(width: int = 40, height: int = 30) -> bytes:
    """A colorful PNG file."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def drawing(seed: int) -> Image.Image:
    """105 x 105 pixels, bilevel, black ink on white, as Omniglot has them."""
    grid = np.random.default_rng(seed).random((15, 15)) < 0.8
    return Image.fromarray(np.kron(grid, np.ones((7, 7))).astype(bool))
