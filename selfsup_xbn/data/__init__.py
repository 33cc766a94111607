"""Image data sets, one file each, and the way from their files to batches of views."""

from __future__ import annotations

import os
from dataclasses import replace

from selfsup_xbn.config.parsing import parse_validation
from selfsup_xbn.config.registry import DATA_SETS
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data.base import ImageData, Split, hold_out_classes, limit
from selfsup_xbn.data.loader import Batch, Batches, eval_batches, raw_pixels
from selfsup_xbn.data.sampler import ClassBalancedBatches, RandomBatches, seed_for

__all__ = [
    "DATA_SETS",
    "Batch",
    "Batches",
    "ClassBalancedBatches",
    "ImageData",
    "RandomBatches",
    "Split",
    "data_of",
    "eval_batches",
    "limit",
    "load_data",
    "raw_pixels",
    "seed_for",
]


def load_data(spec: str, *, root: str = "data", cache_bytes: int = 2 * 2**30, workers: int | None = None) -> ImageData:
    """Return the data set that ``spec`` names: ``"digits"``, ``"cifar10"``, ``"folder:PATH"``...

    Args:
        spec: a name, or ``name:PATH`` for files that are elsewhere than under ``root``.
        root: folder of the data sets that have their own files; downloads go there.
        cache_bytes: images of one size are kept in memory if all of them take no more than this.
        workers: processes that read files; ``None``: one a core, at most 8.

    Raises:
        UserError: no such data set, or its files are missing or broken.
    """
    name, _, path = spec.partition(":")
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    data: ImageData = DATA_SETS.find(name)(name, path, root=root, cache_bytes=cache_bytes, workers=workers)
    return data


def data_of(config: Config) -> ImageData:
    """Return the config's data set, cut to ``limit_train`` images, at ``image_size``, some classes held out."""
    data = load_data(config.data, root=config.data_root, workers=config.workers or 1)
    if config.limit_train:
        data = replace(data, train=limit(data.train, config.limit_train, config.seed))
    if share := parse_validation(config.validation):
        train, validation = hold_out_classes(data.train, share, config.seed)
        data = replace(data, train=train, validation=validation)
    return replace(data, image_size=config.image_size or data.image_size)
