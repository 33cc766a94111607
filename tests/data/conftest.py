from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path) -> Tree:
    """Writes an image-folder tree of random PNGs: ``tree(train={"cat": [(width, height), ...]}, test={...})``."""
    rng = np.random.default_rng(0)

    def write(**parts: dict[str, list[tuple[int, int]]]) -> Path:
        for part, classes in parts.items():
            for label, sizes in classes.items():
                folder = tmp_path / "photos" / part / label
                folder.mkdir(parents=True)
                for number, (width, height) in enumerate(sizes):
                    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number:03}.png")
        return tmp_path / "photos"

    return write
