"""Reading of many image files with worker processes: their pixels, or only their sizes.

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
"""Maximum number of files, and of bytes of pixels, that a worker returns at a time when it reads each file once."""


class _Calls(Dataset):
    """Apply ``function`` to each key of a batch and collate the results.

    A ``UserError`` is returned, because ``DataLoader`` would add the worker's traceback to the message of a raised one.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            return default_collate([self.function(key) for key in keys])
        except UserError as error:
            return error


class _Keys:
    """A batch sampler whose batches can be replaced between two passes, while the worker processes persist."""

    batches: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _as_is(batch: Any) -> Any:
    return batch


def _leave_process_group(worker: int) -> None:
    """Move the worker to a process group without the training process.

    A terminal and torchrun send their signals to the whole group. The training process handles such a signal by
    finishing its step, for which it needs the workers.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class ParallelReader:
    """Apply a function to batches of keys in worker processes.

    Args:
        function: A picklable function from a key to a tensor or to a tuple of tensors.
        workers: The number of worker processes, which persist until the reader is deleted. 0 calls the function in
            the calling process.
        pin_memory: Whether to return tensors in page-locked memory, for asynchronous copies to a GPU.
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
            generator=torch.Generator(),  # by default each pass would draw from the global generator
        )

    def __call__(self, batches: Iterable[Sequence[Any]]) -> Iterator[Any]:
        """Yield the collated results of each batch of keys, in order.

        Raises:
            UserError: If the function raises it for one of the keys.
        """
        self._keys.batches = batches
        for result in self._loader:
            if isinstance(result, UserError):
                # A copy: raising ``result`` itself would create a reference cycle that keeps the workers alive.
                raise type(result)(*result.args)
            yield result


def decode_same_size(paths: Sequence[str], max_bytes: int, workers: int) -> UInt8[Tensor, "N 3 H W"] | None:
    """Decode images of one size into one tensor.

    Args:
        paths: The image files; at least one.
        max_bytes: The maximum size of the tensor in bytes.
        workers: The number of worker processes.

    Returns:
        The pixels, or ``None`` if the sizes differ or the tensor would be larger than ``max_bytes``.

    Raises:
        UserError: If a file cannot be read.
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
    """Return the width and height in pixels of each image, from the headers of the files.

    The pixels are not decoded, so a file with broken pixels is not detected.

    Args:
        paths: The image files.
        workers: The number of worker processes.

    Raises:
        UserError: If a file cannot be opened or is not an image.
    """
    return torch.cat([sizes for _, sizes in _chunks(_Size(paths), len(paths), CHUNK, workers, "checking")])


def failures(function: Callable[[int], object], count: int, workers: int) -> dict[int, str]:
    """Return the message of the error for each of 0 to ``count`` - 1 for which a function raises a ``UserError``.

    Args:
        function: A picklable function that reads the file with a number.
        count: The number of files.
        workers: The number of worker processes.

    Example:
        >>> from selfsup_xbn.data.images import read_image
        >>> failures(lambda number: read_image("no.png"), 1, 0)
        {0: 'no.png: not a readable image (No such file or directory); repair or remove the file'}
    """
    if not count:
        return {}
    chunks = _chunks(_Failure(function), count, CHUNK, workers, "decoding")
    messages = [message for _, messages in chunks for message in messages]
    return {number: message for number, message in enumerate(messages) if message}


class _OtherSizeError(UserError):
    """An image whose size differs from the first one. A ``UserError``, so that the worker returns it."""


class _Decode:
    def __init__(self, paths: Sequence[str], shape: torch.Size) -> None:
        self.paths, self.shape = paths, shape

    def __call__(self, number: int) -> UInt8[Tensor, "3 H W"]:
        image = to_bytes(read_image(self.paths[number]))
        if image.shape != self.shape:
            raise _OtherSizeError(self.paths[number])
        return image


class _Failure:
    def __init__(self, function: Callable[[int], object]) -> None:
        self.function = function

    def __call__(self, number: int) -> str:
        try:
            self.function(number)
        except UserError as error:
            return str(error)
        return ""


class _Size:
    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __call__(self, number: int) -> Int64[Tensor, "2"]:
        with open_image(self.paths[number]) as image:
            return torch.tensor(image.size)


def _chunks(
    function: Callable[[int], Any], count: int, chunk: int, workers: int, verb: str
) -> Iterator[tuple[int, Any]]:
    """Yield the first number and the collated results of each chunk of 0 to count - 1, with a bar on a terminal."""
    starts = range(0, count, chunk)
    batches = [range(start, min(start + chunk, count)) for start in starts]
    results = ParallelReader(function, min(workers, len(batches) - 1))(batches)
    with tqdm(total=count, desc=f"{verb} images", unit=" files", disable=not sys.stderr.isatty(), leave=False) as bar:
        for start, result in zip(starts, results, strict=True):
            yield start, result
            bar.update(len(result))
