"""What a queue may not be: larger than the memory that is free; and what is worth a word about its size.

Axis legend: M queue rows, D dimensions, N training images, B batch.
"""

from __future__ import annotations

import os

import torch

from selfsup_xbn.config import Config, queue_rows
from selfsup_xbn.errors import UserError


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
    labels = 8 * rows if config.mode == "supervise" else 0
    return rows * config.dim * itemsize + labels + 10 * 8 * config.dim if rows else 0


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

    Such a queue still holds an image's row of the epoch before whenever the image comes again: an anchor meets itself.
    """
    rows, most = queue_rows(config, images), images - config.batch_size
    if rows <= most:
        return ""
    itself = "a positive of its own image" if config.mode == "supervise" else "its own image among the negatives"
    return (
        f"note: a queue of {rows:,} rows is more than the {images:,} training images less a batch: from the second "
        f"epoch on an anchor meets {itself}; --queue-size {max(most, 1)} avoids most of that"
    )
