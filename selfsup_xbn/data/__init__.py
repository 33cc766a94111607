"""Image data sets, one file each, and the way from their files to batches of views."""

from __future__ import annotations

import importlib
import os

from selfsup_xbn.data.base import ImageData, Split, limit
from selfsup_xbn.data.loader import Batch, Batches, eval_batches, raw_pixels
from selfsup_xbn.data.sampler import ClassBalancedBatches, RandomBatches, seed_for
from selfsup_xbn.errors import UserError, near

__all__ = [
    "Batch",
    "Batches",
    "ClassBalancedBatches",
    "ImageData",
    "RandomBatches",
    "Split",
    "eval_batches",
    "limit",
    "load_data",
    "raw_pixels",
    "seed_for",
]

DATA_SETS = {
    "digits": "digits",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "folder": "folder",
    "digits-disjoint": "digits_disjoint",
    "sop": "sop",
    "inshop": "inshop",
    "deepfashion2": "deepfashion2",
    "cars196": "cars196",
    "cub200": "cub200",
    "omniglot": "omniglot",
}
"""The module of each data set. Its ``load(name, path, *, root, cache_bytes, workers)`` makes the data."""


def load_data(spec: str, *, root: str = "data", cache_bytes: int = 2 * 2**30, workers: int | None = None) -> ImageData:
    """The data set that ``spec`` names: ``"digits"``, ``"cifar10"``, ``"folder:PATH"``...

    Args:
        spec: a name, or ``name:PATH`` for files that are elsewhere than under ``root``.
        root: folder of the data sets that have their own files; downloads go there.
        cache_bytes: images of one size are kept in memory if all of them take no more than this.
        workers: processes that read files; ``None``: one a core, at most 8.

    Raises:
        UserError: no such data set, or its files are missing or broken.
    """
    name, _, path = spec.partition(":")
    if name not in DATA_SETS:
        raise UserError(f"no data set {name!r} (choose from {', '.join(DATA_SETS)}){near(name, DATA_SETS)}")
    module = importlib.import_module(f"selfsup_xbn.data.datasets.{DATA_SETS[name]}")
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    data: ImageData = module.load(name, path, root=root, cache_bytes=cache_bytes, workers=workers)
    return data
