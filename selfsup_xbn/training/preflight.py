"""What a queue may not be: larger than the memory that is free; and what is worth a word about its size.

Axis legend: M queue rows, D dimensions, N training images, B batch.
"""

from __future__ import annotations

import os

import torch

from selfsup_xbn.config.schema import Config, queue_rows
from selfsup_xbn.errors import UserError
from selfsup_xbn.utils.distributed import world


def check_sizes(config: Config, images: int) -> None:
    """Check that batch and queue fit the training set, and that the processes can share a batch.

    Raises:
        UserError: naming the option, its value and the limit.
    """
    if config.batch_size < 2 * world():
        raise UserError(
            f"--batch-size {config.batch_size} leaves some of {world()} processes fewer than 2 images; "
            f"give at least {2 * world()}"
        )
    if config.bn_splits > 1 and config.bn_splits % world():
        raise UserError(
            f"--bn-splits {config.bn_splits} cannot be shared by {world()} processes; give a multiple of them, or 1"
        )
    if config.batch_size > images:
        raise UserError(
            f"--batch-size {config.batch_size} is more than the {images} training images; give at most {images}"
        )
    queue_size = queue_rows(config, images)
    if queue_size > images:
        raise UserError(f"--queue-size {queue_size} is more than the {images} training images; give at most {images}")


def check_memory(config: Config, images: int, device: torch.device) -> None:
    """Refuses, before it is allocated, a queue that does not fit into the device's free memory.

    Raises:
        UserError: naming the bytes that it takes, those that are free, and what to change.
    """
    needed, free = queue_bytes(config, images), free_bytes(device)
    if needed > free:
        raise UserError(
            f"--queue-size: {queue_rows(config, images):,} rows of {config.dim:,} dimensions take {needed:,} bytes and "
            f"{device} has {free:,} free: give a smaller --queue-size or --dim, or --queue-dtype bfloat16"
        )


def queue_bytes(config: Config, images: int) -> int:
    """Bytes of the rows, their labels, and the moments of a queue for so many training images."""
    rows, itemsize = queue_rows(config, images), getattr(torch, config.queue_dtype).itemsize
    labels = 8 * rows if config.labelled else 0
    return rows * config.dim * itemsize + labels + 4 * 8 * config.dim if rows else 0


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a CUDA device, or in this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":") for line in lines)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def queue_note(config: Config, images: int) -> str:
    """A line on a queue of more than N - B rows, "" for a smaller one.

    In no step of a later epoch is such a queue free of rows of the epoch before, so that anchors meet themselves.
    """
    rows = queue_rows(config, images)
    if rows <= images - config.batch_size:
        return ""
    share = self_meetings(rows, images, config.batch_size)
    itself = "as a positive" if config.labelled else "as a negative"
    return (
        f"note: a queue of {rows:,} rows is more than the {images:,} training images less a batch: from the second "
        f"epoch on about {share:.0%} of the anchors meet their own image's last row {itself}; half the --queue-size "
        "makes it a quarter of that"
    )


def self_meetings(rows: int, images: int, batch_size: int) -> float:
    """Share of the anchors of an epoch, the first one apart, whose image's row of the epoch before is in the queue.

    Step t has (t + 1) B rows of its own epoch, and of the last one M - (t + 1) B, drawn from all N images.
    """
    steps = images // batch_size
    return sum(max(0, rows - (step + 1) * batch_size) for step in range(steps)) / (images * steps)
