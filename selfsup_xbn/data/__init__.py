"""Image data sets, one module each, and the loaders that turn them into batches of views."""

from __future__ import annotations

import os
from dataclasses import replace

from selfsup_xbn.config.parsing import parse_channels, parse_share
from selfsup_xbn.config.registry import DATA_SETS
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data.base import ImageData, Split, hold_out_classes, limit
from selfsup_xbn.data.loader import Batch, Batches, eval_batches, raw_pixels
from selfsup_xbn.data.parts import check_matches, limit_test, split_classes
from selfsup_xbn.data.sampler import ClassBalancedBatches, RandomBatches, seed_for
from selfsup_xbn.errors import UserError
from selfsup_xbn.models.statistics import statistics_of

__all__ = [
    "DATA_SETS",
    "Batch",
    "Batches",
    "ClassBalancedBatches",
    "ImageData",
    "RandomBatches",
    "Split",
    "check_spec",
    "data_of",
    "eval_batches",
    "limit",
    "load_data",
    "raw_pixels",
    "seed_for",
]

OWN_FILES = {"folder": "PATH", "list": "FILE.csv"}
"""Data sets of the user's own files, and the placeholder of their path."""


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
    check_spec(spec)
    name, _, path = spec.partition(":")
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    data: ImageData = DATA_SETS.find(name)(name, path, root=root, cache_bytes=cache_bytes, workers=workers)
    return data


def check_spec(spec: str) -> None:
    """Check that a specification names a data set, before files are opened.

    Raises:
        UserError: If the name is unknown, or its path is missing. If it is a path, the message states how to write it.
    """
    name, _, path = spec.partition(":")
    if name in OWN_FILES and not path:
        raise UserError(f"--data {name}: expected a path, got none; write {name}:{OWN_FILES[name]}")
    if name in DATA_SETS:
        return
    kind = "list" if spec.lower().endswith((".csv", ".tsv", ".txt")) or name in ("csv", "tsv") else "folder"
    if name in ("csv", "tsv", "dir", "images", "imagefolder", "path") and path:
        raise UserError(f"unknown data set {spec!r}: write {kind}:{path}")
    if os.path.exists(spec) or os.sep in name:
        raise UserError(f"unknown data set {spec!r}: for a path write {kind}:{spec}")
    DATA_SETS.find(name)


def data_of(config: Config) -> ImageData:
    """Return the data set of a run.

    Args:
        config: The settings. ``split_classes`` divides the classes of a data set without test images,
            ``limit_train`` and ``limit_test`` limit the numbers of images, ``validation`` holds out some of the
            training classes, and ``image_size`` sets the side of the views in pixels. The normalization is that of
            ``mean`` and ``std``, that of the network if it has initial weights, or that of the data set.

    Raises:
        UserError: If the data set cannot be loaded, it has no classes or test images and the mode needs them, or too
            few classes are held out or kept.
    """
    data = load_data(config.data, root=config.data_root, workers=config.workers or 1)
    if share := parse_share(config.split_classes, "--split-classes"):
        data = split_classes(data, share)
    if config.labelled and not data.labelled:
        remedy = "add a column label" if data.name.startswith("list:") else "put the images into a folder per class"
        raise UserError(f"mode {config.mode} requires classes, {data.name} has none: {remedy}")
    if config.labelled and not len(data.test):
        raise UserError(f"mode {config.mode} requires test images, {data.name} has none: try --split-classes 50%")
    if config.limit_train:
        data = replace(data, train=limit(data.train, config.limit_train, config.seed))
    if config.limit_test:
        data = limit_test(data, config.limit_test, config.seed)
    if share := parse_share(config.validation, "--validation"):
        if data.validation is not None:
            raise UserError(f"--validation: expected 0, because {data.name} has validation images; remove the option")
        train, validation = hold_out_classes(data.train, share, config.seed)
        data = replace(data, train=train, validation=validation)
    if config.evaluator == "retrieval":
        check_matches(data)
    mean, std = normalization(config, data.channels)
    return replace(data, image_size=config.image_size or data.image_size, mean=mean or data.mean, std=std or data.std)


def normalization(config: Config, channels: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and standard deviation of each channel, each ``None`` if it is that of the data set.

    They are those of the options ``mean`` and ``std``, or those of a network that has initial weights.

    Args:
        config: The settings of the run.
        channels: The number of channels of the images.
    """
    own = statistics_of(config.backbone) if config.weights and channels == 3 else None
    mean, std = own or (None, None)
    return parse_channels(config.mean, "--mean", channels) or mean, parse_channels(config.std, "--std", channels) or std
