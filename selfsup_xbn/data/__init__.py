"""Image data sets, one module each, and the loaders that turn them into batches of views."""

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
        spec: A name, or ``name:PATH`` to read the files from another folder than ``root``.
        root: The folder of the data sets that are read from files. Downloads are stored there.
        cache_bytes: The most bytes that decoded images of one size may take in memory. Larger data sets stay on disk.
        workers: The number of processes that read files. ``None`` stands for one per core, at most 8.

    Returns:
        The splits, the names of the classes and the normalization.

    Raises:
        UserError: If the data set does not exist, or its files are missing or broken.

    Example:
        >>> data = load_data("digits")
        >>> len(data.train), len(data.test), data.num_classes
        (1437, 360, 10)
    """
    name, _, path = spec.partition(":")
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    data: ImageData = DATA_SETS.find(name)(name, path, root=root, cache_bytes=cache_bytes, workers=workers)
    return data


def data_of(config: Config) -> ImageData:
    """Return the data set of a run.

    Args:
        config: The settings. ``limit_train`` limits the number of training images, ``validation`` holds out some of
            the training classes, and ``image_size`` sets the side of the views in pixels.

    Raises:
        UserError: If the data set cannot be loaded, or too few classes are held out or kept.
    """
    data = load_data(config.data, root=config.data_root, workers=config.workers or 1)
    if config.limit_train:
        data = replace(data, train=limit(data.train, config.limit_train, config.seed))
    if share := parse_validation(config.validation):
        train, validation = hold_out_classes(data.train, share, config.seed)
        data = replace(data, train=train, validation=validation)
    return replace(data, image_size=config.image_size or data.image_size)
