"""Loaders of batches of views, from images in memory or, with worker processes, from files.

A random view is a pure function of (seed, epoch, step, position in the batch, view). A run that resumes at any step,
with any number of workers, therefore draws the same views. ``README.md`` states which images are held in memory.

Axis legend: B batch, b the shard of the process, C channels, N samples, S the view's side, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from selfsup_xbn.config.schema import Config
from selfsup_xbn.data.augmentations import memory_views
from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.data.file_views import FileViews
from selfsup_xbn.data.files import EvalFile, RandomFile, SmallFile, fit
from selfsup_xbn.data.image_ops import normalize
from selfsup_xbn.data.prefetch import on_device
from selfsup_xbn.data.sampler import ClassBalancedBatches, RandomBatches, Sampler, seed_for
from selfsup_xbn.data.workers import ParallelReader
from selfsup_xbn.utils.distributed import shard_slice

RAW_SIDE = 32
"""Maximum side in pixels of the images of ``raw_pixels``."""

CPU_CHUNK = 128
"""Number of views that are computed at a time on a CPU."""

EVAL_BATCH = 256
"""Number of images of a batch without randomness."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of one step, on the device.

    Attributes:
        views: The normalized views of the samples of this process's shard.
        labels: The labels of all samples of the batch.
        index: The indices of all samples of the batch in the split.
    """

    views: tuple[Float[Tensor, "b C S S"], ...]
    labels: Int64[Tensor, "B"]
    index: Int64[Tensor, "B"]


class Batches:
    """Load batches of random views.

    Args:
        split: The samples. Images in memory are copied to ``device`` as uint8.
        augmentation: The family of views, as in ``memory_views`` for images in memory and ``file_transform`` for files.
        data: The side and the normalization of the views.
        views: The number of random views per sample.
        sampler: The sampler of the batches.
        device: The device of the batches.
        seed: The seed of the samples and the views.
        workers: The number of processes that read files. It has no effect for images in memory.
        shard: The rank and the number of processes. Each process computes the views of its shard of a batch; they are
            those that one process would compute for the whole batch.
        parts: The number of micro-batches, consecutive and equal parts of a batch. A process has its shard of each.
        compile: Whether to compile the computation of views of images in memory with ``torch.compile``.

    Raises:
        UserError: If the family of views does not exist, or needs color and the images are gray.
    """

    def __init__(
        self,
        split: Split,
        augmentation: str,
        *,
        data: ImageData,
        views: int,
        sampler: Sampler,
        device: torch.device | str = "cpu",
        seed: int = 0,
        workers: int = 0,
        shard: tuple[int, int] = (0, 1),
        parts: int = 1,
        compile: bool = False,
    ) -> None:
        self.sampler, self.device, self.seed = sampler, torch.device(device), seed
        self.labels = split.labels.to(self.device)
        self.processes = shard
        self.shard: slice | list[int] = shard_slice(sampler.batch_size, shard)
        if parts > 1:
            rows = torch.arange(sampler.batch_size).view(parts, -1)
            self.shard = rows[:, shard_slice(rows.shape[1], shard)].flatten().tolist()
        self._source: _MemoryViews | FileViews
        if split.images is not None:
            family = memory_views(augmentation, data)
            function = torch.compile(family.__call__) if compile else family
            self._source = _MemoryViews(
                split.images.to(self.device), function, family.numbers, views, seed, sampler.batch_size, self.shard
            )
        else:
            read = RandomFile(split, augmentation, data, seed, views)
            positions = torch.arange(sampler.batch_size)[self.shard].tolist()
            self._source = FileViews(read, data.mean, data.std, workers, self.device, positions, sampler.batch_size)

    @classmethod
    def from_config(
        cls, config: Config, data: ImageData, device: torch.device, shard: tuple[int, int] = (0, 1)
    ) -> Batches:
        """Return the batches of the training images of a run.

        Args:
            config: The settings of the run.
            data: The data set.
            device: The device of the batches.
            shard: The rank and the number of processes.

        Raises:
            UserError: If the batch size does not fit the data set, or the augmentation does not exist.
        """
        return cls(
            data.train,
            config.augmentation or data.augmentation,
            data=data,
            views=config.views,
            sampler=sampler_of(config, data.train.labels),
            device=device,
            seed=config.seed,
            workers=config.workers,
            shard=shard,
            parts=config.accumulate,
            compile=config.compile,
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def views(self, index: Int64[Tensor, "R"], *seed: int) -> Float[Tensor, "r C S S"]:
        """Return a random view of each of some samples, other than those of the batches; of R samples, the shard's.

        Args:
            index: The indices of the samples.
            *seed: The epoch, the step, and the number of the call in the step.
        """
        return self._source.again(index, seed, shard_slice(len(index), self.processes))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Args:
            epoch: The epoch, counted from 0.
            start: The first step, counted from 0.

        Raises:
            UserError: If an image file cannot be read.
        """
        plan = self.sampler.epoch(self.seed, epoch)
        index = plan.to(self.device)
        for step, views in enumerate(self._source.epoch(plan[:, self.shard], epoch, start), start):
            yield Batch(views, self.labels[index[step]], index[step])


@dataclass(frozen=True, eq=False)
class _MemoryViews:
    """Random views of images in memory, computed on the device of the images."""

    images: UInt8[Tensor, "N C H W"]
    function: Callable[[Tensor, Tensor], Tensor]
    numbers: int
    views: int
    seed: int
    batch_size: int
    shard: slice | list[int]

    def epoch(self, plan: Int64[Tensor, "steps b"], epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        index, generator = plan.to(self.images.device), torch.Generator(self.images.device)
        # On a CPU, chunks that fit into its cache reduce the time by a third.
        chunk = CPU_CHUNK if self.images.device.type == "cpu" else self.batch_size * self.views
        for step in range(start, len(index)):
            generator.manual_seed(seed_for(self.seed, epoch, step))
            images = self.images[index[step]].repeat(self.views, 1, 1, 1)
            chunks = zip(images.split(chunk), self._uniform(generator).split(chunk), strict=True)
            yield torch.cat([self.function(*inputs) for inputs in chunks]).chunk(self.views)

    def again(self, index: Int64[Tensor, "R"], seed: tuple[int, ...], own: slice) -> Float[Tensor, "r C S S"]:
        generator = torch.Generator(self.images.device).manual_seed(seed_for(self.seed, *seed))
        numbers = torch.rand(len(index), self.numbers, generator=generator, device=generator.device)[own]
        return self.function(self.images[index[own]], numbers)

    def _uniform(self, generator: torch.Generator) -> Float[Tensor, "rows P"]:
        """Draw the random numbers of the whole batch, so that they do not depend on the shards; return the shard's."""
        shape = self.views, self.batch_size, self.numbers
        return torch.rand(shape, generator=generator, device=generator.device)[:, self.shard].flatten(0, 1)


def sampler_of(config: Config, labels: Int64[Tensor, "N"]) -> Sampler:
    """Return the sampler of the batches of a run.

    Args:
        config: The settings of the run.
        labels: The class of each training image.

    Raises:
        UserError: If the batch size does not fit the number of images or of classes.
    """
    if config.images_per_class:
        return ClassBalancedBatches(labels, config.batch_size, config.images_per_class)
    return RandomBatches(len(labels), config.batch_size)


def eval_batches(
    split: Split, data: ImageData, *, device: torch.device | str = "cpu", batch_size: int = EVAL_BATCH, workers: int = 0
) -> Iterator[Float[Tensor, "B C S S"]]:
    """Yield the evaluation views of all samples, in order.

    The boxes of the split are cropped first. For images that are not S x S, the shorter side is resized to S / 0.875
    and the central S x S pixels are cropped, as torchvision and timm do.

    Args:
        split: The samples.
        data: The side S and the normalization of the views.
        device: The device of the batches.
        batch_size: The number of samples B of a batch. The last batch may be smaller.
        workers: The number of processes that read files.

    Raises:
        UserError: If an image file cannot be read.

    Example:
        >>> from selfsup_xbn.data import load_data
        >>> data = load_data("digits")
        >>> next(eval_batches(data.test, data, batch_size=4)).shape
        torch.Size([4, 1, 8, 8])
    """
    device = torch.device(device)
    ranges = [range(first, min(first + batch_size, len(split))) for first in range(0, len(split), batch_size)]
    pixels: Iterable[Tensor]
    if split.images is not None:
        pixels = (split.images[keys.start : keys.stop] for keys in ranges)
    else:
        pixels = ParallelReader(EvalFile(split, data.image_size), workers, pin_memory=device.type == "cuda")(ranges)
    for [images] in on_device(([images] for images in pixels), device):
        yield normalize(fit(images.float() / 255, data.image_size), data.mean, data.std)


def raw_pixels(split: Split, *, workers: int = 0) -> Float[Tensor, "N F"]:
    """Return the pixels of each image as a feature vector, for a baseline without an encoder.

    Images that are larger than 32 x 32 pixels are resized to that size.

    Args:
        split: The samples.
        workers: The number of processes that read files.

    Returns:
        The values of the pixels, in [0, 1].

    Raises:
        UserError: If an image file cannot be read.

    Example:
        >>> from selfsup_xbn.data import load_data
        >>> raw_pixels(load_data("digits").test).shape
        torch.Size([360, 64])
    """
    if split.images is None:
        keys = [range(first, min(first + EVAL_BATCH, len(split))) for first in range(0, len(split), EVAL_BATCH)]
        images = torch.cat(list(ParallelReader(SmallFile(split, RAW_SIDE), workers)(keys)))
        return images.flatten(1).float() / 255
    if max(split.images.shape[2:]) <= RAW_SIDE:
        return split.images.flatten(1).float() / 255
    side = [RAW_SIDE, RAW_SIDE]
    chunks = [
        F.interpolate(images.float() / 255, side, mode="bilinear", antialias=True)
        for images in split.images.split(EVAL_BATCH)
    ]
    return torch.cat(chunks).flatten(1)
