"""Checks of the sizes of batch and queue before the training.

Axis legend: M queue rows, D embedding dimension, N training images, B batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.config.schema import Config, queue_rows
from selfsup_xbn.data import ImageData, check_spec
from selfsup_xbn.data.files import broken_files
from selfsup_xbn.errors import UserError
from selfsup_xbn.methods.base import Method, adaptation_from_config
from selfsup_xbn.methods.metric_learning import make_loss
from selfsup_xbn.models.pretrained import check_weights
from selfsup_xbn.utils.distributed import world

SHOWN = 50
"""Maximum number of broken images in the message of an error."""


def check_config(config: Config, *, download: bool = True) -> None:
    """Check data set, network, loss and miner, and load the initial weights, before images are opened.

    Args:
        config: Configuration of the run.
        download: Whether ImageNet weights may be downloaded.

    Raises:
        UserError: A name is unknown, the path of the data does not exist, or the weights cannot be loaded.
    """
    check_spec(config.data)
    path = config.data.partition(":")[2]
    if path and not os.path.exists(os.path.expanduser(path)):
        raise UserError(f"--data {config.data}: {path} does not exist")
    check_weights(config, download=download)
    if isinstance(config, SuperviseConfig):
        make_loss(config)
        if config.moment_gradient and not adaptation_from_config(config).follows_batch:
            raise UserError(
                f"--moment-gradient: expected --adaptation xbn, got {config.adaptation}, which does not move the rows "
                "to the moments of the batch"
            )


def check_sizes(config: Config, images: int, notes: Sequence[str] = ()) -> None:
    """Check that batch and queue fit the training set, and that a batch can be split over the processes.

    Args:
        config: Configuration of the run.
        images: Number of training images.
        notes: Notes of the data set, such as on files that were skipped, which the message of an error repeats.

    Raises:
        UserError: A size is invalid. The message states the option, its value and the limit.
    """
    try:
        _check_sizes(config, images)
    except UserError as error:
        raise UserError(f"{error} ({'; '.join(notes)})") if notes else error from None


def check_images(data: ImageData, workers: int) -> None:
    """Decode every image of a folder or of a list, which takes as long as reading them in an epoch.

    Args:
        data: Data set.
        workers: Number of processes that read files.

    Raises:
        UserError: Images cannot be decoded. The message has the path of each, of at most ``SHOWN`` images.
    """
    broken = broken_files(data, workers) if data.name.startswith(("folder:", "list:")) else {}
    if len(broken) == 1:
        raise UserError(next(iter(broken.values())))
    if broken:
        shown = ", ".join(list(broken)[:SHOWN]) + f" and {len(broken) - SHOWN} more" * (len(broken) > SHOWN)
        raise UserError(f"{len(broken)} images cannot be decoded; repair or remove the files: {shown}")


def _check_sizes(config: Config, images: int) -> None:
    if config.batch_size % (config.accumulate * max(config.images_per_class, 1)):
        raise UserError(
            f"--accumulate {config.accumulate}: expected a divisor of --batch-size {config.batch_size} that leaves "
            "whole images and classes in each micro-batch"
        )
    if config.accumulate > 1 and config.batch_size // config.accumulate < 2 * world():
        raise UserError(
            f"--accumulate {config.accumulate}: expected at least {2 * world()} images in each micro-batch, 2 for each "
            f"of {world()} processes, got {config.batch_size // config.accumulate}"
        )
    if config.batch_size < 2 * world():
        raise UserError(
            f"--batch-size: expected at least {2 * world()}, 2 images for each of {world()} processes, "
            f"got {config.batch_size}"
        )
    if config.bn_splits > 1 and config.bn_splits % world():
        raise UserError(
            f"--bn-splits: expected 1 or a multiple of the number of processes, {world()}, got {config.bn_splits}"
        )
    if config.batch_size > images:
        raise UserError(
            f"--batch-size: expected at most the number of training images, {images}, got {config.batch_size}"
        )
    queue_size = queue_rows(config, images)
    enqueued = config.batch_size * (2 if getattr(config, "symmetric", False) else 1)
    if config.shard_queue and 0 < queue_size < enqueued * world() and world() > 1:
        raise UserError(
            f"--shard-queue: expected a queue of at least {enqueued * world()} rows, {enqueued} for each of {world()} "
            f"processes, got {queue_size}"
        )
    for option in ("renew", "drift_residual"):
        if getattr(config, option) and queue_size < 2:
            raise UserError(
                f"--{option.replace('_', '-')}: expected a queue of at least 2 rows, got {queue_size}: BatchNorm needs "
                "two images"
            )
    if config.renew > queue_size:
        raise UserError(f"--renew: expected at most the number of rows of the queue, {queue_size}, got {config.renew}")
    if queue_size > images:
        raise UserError(
            f"--queue-size: expected at most the number of training images, {images}, got {queue_size}; "
            "try --queue-size 50%"
        )


def check_memory(config: Config, images: int, device: torch.device) -> None:
    """Check that the queue fits into the free memory of the device.

    Args:
        config: Configuration of the run.
        images: Number of training images.
        device: Device of the queue.

    Raises:
        UserError: The queue does not fit. The message states the required and the free bytes.
    """
    needed, free = queue_bytes(config, images) // (world() if config.shard_queue else 1), free_bytes(device)
    if needed > free:
        raise UserError(
            f"--queue-size: {queue_rows(config, images):,} rows of {config.dim:,} dimensions require {needed:,} bytes, "
            f"but {device} has {free:,} free: reduce --queue-size or --dim, or use --queue-dtype bfloat16"
        )


def queue_bytes(config: Config, images: int) -> int:
    """Return the size in bytes of the rows, the labels and the moments of the queue.

    Args:
        config: Configuration of the run.
        images: Number of training images.
    """
    rows, itemsize = queue_rows(config, images), getattr(torch, config.queue_dtype).itemsize
    labels = 8 * rows if config.labelled else 0
    return rows * config.dim * itemsize + labels + 4 * 8 * config.dim if rows else 0


def free_bytes(device: torch.device) -> int:
    """Return the free memory in bytes of a CUDA device, or of the machine for any other device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":") for line in lines)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def queue_note(config: Config, images: int) -> str:
    """Return a note on a queue of more than N - B rows, or ``""`` for a smaller queue.

    At every step after the first epoch such a queue has rows of the previous epoch, some of which are embeddings of the
    images in the batch.

    Args:
        config: Configuration of the run.
        images: Number of training images N.
    """
    rows = queue_rows(config, images)
    if rows <= images - config.batch_size or config.epochs == 1:
        return ""
    share, half = (self_match_fraction(size, images, config.batch_size) for size in (rows, rows // 2))
    role = "positive" if config.labelled else "negative"
    return (
        f"note: from the second epoch on, about {share:.0%} of the anchors meet their own image in the queue as a "
        f"{role}; with half the --queue-size {half:.0%}"
    )


def empty_queue_note(config: Config) -> str:
    """Return a note on a queue that is empty at the first loss, or ``""``.

    Args:
        config: Configuration of the run.
    """
    if getattr(config, "enqueue", "") != "after_loss":
        return ""
    return "note: --enqueue after_loss: the queue is empty at the first step of a run, whose loss and gradient are 0"


def accumulation_note(config: Config, method: Method) -> str:
    """Return a note on when a step of micro-batches updates the queue, or ``""`` for steps of one batch."""
    if config.accumulate == 1:
        return ""
    part = config.batch_size // config.accumulate
    if method.queue_takes_whole_batch:
        return f"note: --accumulate: the queue is adapted to and takes all {config.batch_size} keys of a step at once"
    return (
        f"note: --accumulate: the queue is adapted to and takes the {part} embeddings of each micro-batch in turn, and "
        f"pairs within the batch are those of {part} images"
    )


def self_match_fraction(rows: int, images: int, batch_size: int) -> float:
    """Return the fraction of anchors whose own image is in the queue with an embedding of the previous epoch.

    At step t of any epoch after the first one, the queue has (t + 1) B rows of the current epoch. The other
    M - (t + 1) B rows are of the previous epoch and belong to a random subset of the N images.

    Args:
        rows: Number of rows M in the queue.
        images: Number of training images N.
        batch_size: Number of images B per step.

    Example:
        >>> self_match_fraction(rows=8, images=8, batch_size=4)
        0.25
    """
    steps = images // batch_size
    return sum(max(0, rows - (step + 1) * batch_size) for step in range(steps)) / (images * steps)
