"""From a split to batches of views: on the device where images are in memory, by worker processes where they are files.

Everything random in a batch is a pure function of (seed, epoch, step, position in the batch, view). So a run that
resumes at any step, with any number of workers, sees the very same views.

Axis legend: B batch, b this process's shard of it, C channels, N samples, S the view's side, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from selfsup_xbn.config.schema import Config
from selfsup_xbn.data.augmentations import Views, memory_views
from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.data.files import EvalFile, RandomFile, SmallFile, fit
from selfsup_xbn.data.image_ops import normalize
from selfsup_xbn.data.sampler import ClassBalancedBatches, RandomBatches, Sampler, seed_for
from selfsup_xbn.data.workers import ParallelReader
from selfsup_xbn.utils.distributed import shard_slice

RAW_SIDE = 32
PIECE = 128


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's input, on the device: labels and numbers in the split of its B samples, and views of those b of them
    that are this process's shard.
    """

    views: tuple[Float[Tensor, "b C S S"], ...]
    labels: Int64[Tensor, "B"]
    index: Int64[Tensor, "B"]


class Batches:
    """Batches of random views, epoch after epoch.

    Args:
        split: the samples; in memory they are kept on ``device`` as bytes.
        augmentation: family of views, see ``memory_views`` and for files ``file_transform``.
        data: says the views' side and normalisation.
        views: random views of each sample.
        sampler: which samples make up each batch.
        workers: processes that read files; in memory unused.
        shard: (rank, world): views of the rank's shard of each batch only, the same as in the whole batch.

    Raises:
        UserError: no such family.
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
    ) -> None:
        self.sampler, self.device, self.seed = sampler, torch.device(device), seed
        self.labels = split.labels.to(self.device)
        self.shard = shard_slice(sampler.batch_size, shard)
        self._source: _MemoryViews | _FileViews
        if split.images is not None:
            family = memory_views(augmentation, data)
            self._source = _MemoryViews(
                split.images.to(self.device), family, views, seed, sampler.batch_size, self.shard
            )
        else:
            function = RandomFile(split, augmentation, data, seed, views)
            self._source = _FileViews(function, workers, self.device, self.shard.start)

    @classmethod
    def from_config(
        cls, config: Config, data: ImageData, device: torch.device, shard: tuple[int, int] = (0, 1)
    ) -> Batches:
        """Return the batches that a run of ``config`` trains on: the mode's views of the training images."""
        sampler: Sampler = RandomBatches(len(data.train), config.batch_size)
        if config.images_per_class:
            sampler = ClassBalancedBatches(data.train.labels, config.batch_size, config.images_per_class)
        return cls(
            data.train,
            config.augmentation or data.augmentation,
            data=data,
            views=config.views,
            sampler=sampler,
            device=device,
            seed=config.seed,
            workers=config.workers,
            shard=shard,
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0, from step ``start`` on."""
        plan = self.sampler.epoch(self.seed, epoch)
        index = plan.to(self.device)
        for step, views in enumerate(self._source.epoch(plan[:, self.shard], epoch, start), start):
            yield Batch(views, self.labels[index[step]], index[step])


@dataclass(frozen=True, eq=False)
class _MemoryViews:
    """Views drawn on the device that holds the images."""

    images: UInt8[Tensor, "N C H W"]
    family: Views
    views: int
    seed: int
    batch_size: int
    shard: slice

    def epoch(self, plan: Int64[Tensor, "steps b"], epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        index, generator = plan.to(self.images.device), torch.Generator(self.images.device)
        # On a CPU, pieces that fit its cache save a third of the time.
        piece = PIECE if self.images.device.type == "cpu" else self.batch_size * self.views
        for step in range(start, len(index)):
            generator.manual_seed(seed_for(self.seed, epoch, step))
            images = self.images[index[step]].repeat(self.views, 1, 1, 1)
            pieces = zip(images.split(piece), self._uniform(generator).split(piece), strict=True)
            yield torch.cat([self.family(*part) for part in pieces]).chunk(self.views)

    def _uniform(self, generator: torch.Generator) -> Float[Tensor, "rows P"]:
        """Random numbers for this shard of the batch: drawn for the whole of it, so that they are the same numbers."""
        shape = self.views, self.batch_size, self.family.numbers
        return torch.rand(shape, generator=generator, device=generator.device)[:, self.shard].flatten(0, 1)


class _FileViews:
    """Views made by worker processes."""

    def __init__(self, function: RandomFile, workers: int, device: torch.device, first: int) -> None:
        self.device, self.first = device, first
        self.read = ParallelReader(function, workers, pin_memory=device.type == "cuda")

    def epoch(self, plan: Int64[Tensor, "steps b"], epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        keys = (
            [(sample, epoch, step, place) for place, sample in enumerate(plan[step].tolist(), self.first)]
            for step in range(start, len(plan))
        )
        for views in self.read(keys):
            yield tuple(view.to(self.device, non_blocking=True) for view in views)


def eval_batches(
    split: Split, data: ImageData, *, device: torch.device | str = "cpu", batch_size: int = 256, workers: int = 0
) -> Iterator[Float[Tensor, "B C S S"]]:
    """All samples in order, without randomness, normalised; the last batch may be smaller.

    Images of another size than ``data.image_size`` have their shorter side resized to S / 0.875 and the middle S x S
    cut out, torchvision's and timm's convention; boxes are cut out first.
    """
    device = torch.device(device)
    ranges = [range(first, min(first + batch_size, len(split))) for first in range(0, len(split), batch_size)]
    if split.images is not None:
        for keys in ranges:
            images = split.images[keys.start : keys.stop].to(device)
            yield normalize(fit(images.float() / 255, data.image_size), data.mean, data.std)
    else:
        read = ParallelReader(EvalFile(split, data.image_size), workers, pin_memory=device.type == "cuda")
        for images in read(ranges):
            yield normalize(images.to(device, non_blocking=True).float() / 255, data.mean, data.std)


def raw_pixels(split: Split, *, workers: int = 0) -> Float[Tensor, "N F"]:
    """The pixels themselves in [0, 1] as features, at most 32 x 32 of them: what an encoder must beat."""
    if split.images is None:
        keys = [range(first, min(first + 256, len(split))) for first in range(0, len(split), 256)]
        images = torch.cat(list(ParallelReader(SmallFile(split, RAW_SIDE), workers)(keys)))
        return images.flatten(1).float() / 255
    if max(split.images.shape[2:]) <= RAW_SIDE:
        return split.images.flatten(1).float() / 255
    side = [RAW_SIDE, RAW_SIDE]
    chunks = [
        F.interpolate(part.float() / 255, side, mode="bilinear", antialias=True) for part in split.images.split(256)
    ]
    return torch.cat(chunks).flatten(1)
