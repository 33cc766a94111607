"""Samplers of the batches of an epoch.

The batches are a pure function of (seed, epoch), so that a run can resume at any step. The ``MPerClassSampler`` of
pytorch-metric-learning does not have this property: it draws from a global generator and shuffles its list of classes
in place, so an epoch depends on all earlier ones. It also draws the classes of each batch independently, so that some
classes occur often in an epoch and others never.

Axis legend: N samples, B batch, C classes, K samples of one class in a batch.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from selfsup_xbn.errors import UserError


def seed_for(*numbers: int) -> int:
    """Return a seed of 63 bits that is a hash of the integers.

    Seeds for other integers, or for another number of integers, are statistically independent.

    Example:
        >>> seed_for(0, 1) == seed_for(0, 1), seed_for(0, 1) == seed_for(0, 1, 0)
        (True, False)
    """
    # The count comes first because SeedSequence pads with zeros: otherwise (1, 2) would equal (1, 2, 0).
    words = np.array([len(numbers), *numbers], np.int64).view(np.uint32)
    return int(np.random.SeedSequence(words.tolist()).generate_state(1, np.uint64)[0] >> np.uint64(1))


@runtime_checkable
class Sampler(Protocol):
    """Sampler of the batches of an epoch. ``len()`` is the number of batches.

    Attributes:
        batch_size: The number of samples B of a batch.
    """

    batch_size: int

    def __len__(self) -> int: ...

    def epoch(self, seed: int, epoch: int) -> Int64[Tensor, "steps B"]:
        """Return the indices of the samples of each batch.

        Args:
            seed: The seed of the run.
            epoch: The epoch, counted from 0.
        """
        ...


class RandomBatches:
    """Sample batches without replacement, in random order. The last N mod B samples of an epoch are dropped.

    Args:
        count: The number of samples N.
        batch_size: The number of samples B of a batch.

    Raises:
        UserError: If the batch size is not in [1, N].
    """

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, _check_batch_size(batch_size, count)

    def __len__(self) -> int:
        return self.count // self.batch_size

    def epoch(self, seed: int, epoch: int) -> Int64[Tensor, "steps B"]:
        """Return the indices of the samples of each batch."""
        order = np.random.default_rng(seed_for(seed, epoch)).permutation(self.count)
        return torch.from_numpy(order[: len(self) * self.batch_size].reshape(len(self), self.batch_size))


class ClassBalancedBatches:
    """Sample batches of B / K classes with K samples each; an epoch has N // B batches.

    The classes are drawn in shuffled cycles. The numbers of times that two classes occur in an epoch differ by at most
    one, and no class occurs twice in a batch. The K samples of a class are distinct, except that a class with fewer
    than K samples is sampled with replacement, as in "Adaptive Cross Batch Normalization for Metric Learning"
    (arXiv 2303.17127).

    Args:
        labels: The class of each sample.
        batch_size: The number of samples B of a batch.
        per_class: The number of samples K of one class in a batch.

    Raises:
        UserError: If the batch size is not in [1, N], is not a multiple of K, or needs more classes than there are.
    """

    def __init__(self, labels: Int64[Tensor, "N"], batch_size: int, per_class: int = 4) -> None:
        self.count, self.batch_size, self.per_class = len(labels), _check_batch_size(batch_size, len(labels)), per_class
        values = labels.numpy()
        order = values.argsort(kind="stable")
        self.members = np.split(order, np.flatnonzero(np.diff(values[order])) + 1)
        if per_class < 1 or batch_size % per_class:
            raise UserError(
                f"expected a batch size that is a multiple of the {per_class} images per class, got {batch_size}; "
                "change one of the two"
            )
        if batch_size // per_class > len(self.members):
            classes = len(self.members)
            more = next(
                k for k in range(per_class, batch_size + 1) if batch_size % k == 0 and batch_size // k <= classes
            )
            raise UserError(
                f"--batch-size {batch_size} with --images-per-class {per_class} needs {batch_size // per_class} "
                f"classes, but the data set has {classes}: use --batch-size {classes * per_class}, or "
                f"--images-per-class {more}"
            )

    def __len__(self) -> int:
        return self.count // self.batch_size

    def epoch(self, seed: int, epoch: int) -> Int64[Tensor, "steps B"]:
        """Return the indices of the samples of each batch; the K samples of a class are adjacent."""
        rng = np.random.default_rng(seed_for(seed, epoch))
        classes = self._classes(rng).ravel()
        rows = [self._draw(rng, self.members[c]) for c in classes]
        return torch.from_numpy(np.stack(rows).reshape(len(self), self.batch_size))

    def _draw(self, rng: np.random.Generator, members: np.ndarray) -> np.ndarray:
        return rng.choice(members, self.per_class, replace=len(members) < self.per_class)

    def _classes(self, rng: np.random.Generator) -> np.ndarray:
        """Return class numbers [steps, B / K] from shuffled cycles of all classes, without duplicates in a row."""
        width = self.batch_size // self.per_class
        rows, waiting = [], np.empty(0, np.int64)
        for _ in range(len(self)):
            if len(waiting) < width:
                cycle = rng.permutation(len(self.members))
                # The classes that are already in the row move to the end of the new cycle.
                repeated = np.isin(cycle, waiting)
                waiting = np.concatenate([waiting, cycle[~repeated], cycle[repeated]])
            rows.append(waiting[:width])
            waiting = waiting[width:]
        return np.stack(rows)


def _check_batch_size(batch_size: int, count: int) -> int:
    if not 1 <= batch_size <= count:
        raise UserError(f"expected a batch size from 1 to {count}, the number of training images, got {batch_size}")
    return batch_size
