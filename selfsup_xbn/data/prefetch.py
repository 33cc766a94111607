"""Copies of batches to a CUDA device on a separate stream, one batch ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor


def on_device(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    """Yield each batch on the device.

    On CUDA, batch n + 1 is read and its copy is launched before batch n is yielded, so that the copy runs during the
    step of batch n. The copies have a stream of their own, and the current stream waits for the copy of the batch that
    is yielded. The host waits only for ``batches``. On other devices a batch is read when it is requested.

    Args:
        batches: Tensors on the host. On CUDA, those in pageable memory are first copied to page-locked memory, because
            the host would wait for their copy to the device.
        device: The device.

    Example:
        >>> batches = [[torch.zeros(2)], [torch.ones(2)]]
        >>> [batch.tolist() for [batch] in on_device(batches, torch.device("cpu"))]
        [[0.0, 0.0], [1.0, 1.0]]
    """
    if device.type != "cuda":
        for batch in batches:
            yield [tensor.to(device) for tensor in batch]
        return
    stream, copies = _copy_stream(device), deque[tuple[list[Tensor], torch.cuda.Event]]()
    for batch in batches:
        with torch.cuda.stream(stream):
            pinned = (tensor if tensor.is_cuda else tensor.pin_memory() for tensor in batch)
            tensors = [tensor.to(device, non_blocking=True) for tensor in pinned]
            copies.append((tensors, stream.record_event()))
        del tensors
        if len(copies) > 1:
            yield _ready(*copies.popleft(), device)
    while copies:
        yield _ready(*copies.popleft(), device)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all copies to the device. The allocator keeps freed memory for each stream separately."""
    return torch.cuda.Stream(device)


def _ready(tensors: list[Tensor], copied: torch.cuda.Event, device: torch.device) -> list[Tensor]:
    """Let the current stream wait for the copy, and the allocator not reuse the memory before the current stream."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for tensor in tensors:
        tensor.record_stream(current)
    return tensors
