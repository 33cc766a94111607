"""Many image files at once, by worker processes: decoded into one tensor, or only their sizes read.

Axis legend: N files, H, W sides in pixels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from selfsup_xbn.data.images import open_image, read_image, to_bytes
from selfsup_xbn.errors import UserError

CHUNK = 250
CHUNK_BYTES = 2**23
"""Files, and bytes of pixels, that a worker hands over at a time when all files are read once."""


class _Calls(Dataset):
    """``function`` of each key of a batch, stacked. A ``UserError`` is a result: raised in a worker, it would reach the
    user as a worker's traceback.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            return default_collate([self.function(key) for key in keys])
        except UserError as error:
            return error


class _Keys:
    """The batches of keys still to be read: set anew for each pass, so that the worker processes live on."""

    batches: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _as_is(batch: Any) -> Any:
    return batch


def _leave_process_group(worker: int) -> None:
    """A signal to stop, which a terminal or torchrun sends to the whole group, is for the process that trains: it
    finishes its step, for which it needs the workers.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class ParallelReader:
    """``reader(batches)`` yields ``function`` of the keys of each batch, collated, in order.

    Args:
        function: from a key to tensors; must be picklable.
        workers: processes that call it; 0: this one. They live until the reader is dropped.
        pin_memory: page-locked results, for copies to a GPU that do not wait.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, *, pin_memory: bool = False) -> None:
        self._keys = _Keys()
        self._loader = DataLoader(
            _Calls(function),
            batch_sampler=self._keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_as_is,
            worker_init_fn=_leave_process_group,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each pass would draw from the global one
        )

    def __call__(self, batches: Iterable[Sequence[Any]]) -> Iterator[Any]:
        self._keys.batches = batches
        for result in self._loader:
            if isinstance(result, UserError):
                # A new one: raising ``result`` would tie it to this frame in a cycle, and the workers with it.
                raise type(result)(*result.args)
            yield result


def decode_same_size(paths: Sequence[str], max_bytes: int, workers: int) -> UInt8[Tensor, "N 3 H W"] | None:
    """All images in one tensor; ``None`` if their sizes differ or they take more than ``max_bytes``.

    Raises:
        UserError: a file cannot be read.
    """
    first = to_bytes(read_image(paths[0]))
    if first.numel() * len(paths) > max_bytes:
        return None
    images = torch.empty(len(paths), *first.shape, dtype=torch.uint8)
    chunk = max(1, min(CHUNK, CHUNK_BYTES // first.numel()))
    try:
        for start, pixels in _chunks(_Decode(paths, first.shape), len(paths), chunk, workers, "decoding"):
            images[start : start + len(pixels)] = pixels
    except _OtherSizeError:
        return None
    return images


def image_sizes(paths: Sequence[str], workers: int) -> Int64[Tensor, "N 2"]:
    """Width and height that each file's header says.

    Raises:
        UserError: a file cannot be opened or is no image. Broken pixels are found when they are read.
    """
    return torch.cat([sizes for _, sizes in _chunks(_Size(paths), len(paths), CHUNK, workers, "checking")])


class _OtherSizeError(UserError):
    """Not the user's fault, but it takes the same way out of a worker."""


class _Decode:
    def __init__(self, paths: Sequence[str], shape: torch.Size) -> None:
        self.paths, self.shape = paths, shape

    def __call__(self, number: int) -> UInt8[Tensor, "3 H W"]:
        image = to_bytes(read_image(self.paths[number]))
        if image.shape != self.shape:
            raise _OtherSizeError(self.paths[number])
        return image


class _Size:
    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __call__(self, number: int) -> Int64[Tensor, "2"]:
        with open_image(self.paths[number]) as image:
            return torch.tensor(image.size)


def _chunks(
    function: Callable[[int], Tensor], count: int, chunk: int, workers: int, verb: str
) -> Iterator[tuple[int, Tensor]]:
    """``function`` of 0 .. count - 1, stacked in chunks, each with its first number; a bar on a terminal."""
    starts = range(0, count, chunk)
    batches = [range(start, min(start + chunk, count)) for start in starts]
    results = ParallelReader(function, min(workers, len(batches) - 1))(batches)
    with tqdm(total=count, desc=f"{verb} images", unit=" files", disable=not sys.stderr.isatty(), leave=False) as bar:
        for start, tensor in zip(starts, results, strict=True):
            yield start, tensor
            bar.update(len(tensor))
