"""Which samples make up each batch of an epoch: a pure function of (seed, epoch), so a run can be resumed anywhere.

pytorch-metric-learning's ``MPerClassSampler`` is not used: it draws from one global random state, and shuffles its list
of classes in place, so that an epoch depends on all epochs before it; and it draws the classes of each batch anew, so
that some classes come often in an epoch and some never.

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
    """A seed of 63 bits for these integers; other integers, or another count of them, give an unrelated one."""
    # Fixed-width words and the count in front: SeedSequence pads with zeros, so (1, 2) would equal (1, 2, 0).
    words = np.array([len(numbers), *numbers], np.int64).view(np.uint32)
    return int(np.random.SeedSequence(words.tolist()).generate_state(1, np.uint64)[0] >> np.uint64(1))


@runtime_checkable
class Sampler(Protocol):
    """The batches of an epoch; ``len()`` is the number of steps."""

    batch_size: int

    def __len__(self) -> int: ...

    def epoch(self, seed: int, epoch: int) -> Int64[Tensor, "steps B"]: ...


class RandomBatches:
    """Every sample once an epoch, in random order; the last N mod B samples of the order are left out.

    Raises:
        UserError: the batch is larger than the data.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, _checked(batch_size, count)

    def __len__(self) -> int:
        return self.count // self.batch_size

    def epoch(self, seed: int, epoch: int) -> Int64[Tensor, "steps B"]:
        """Sample numbers of each batch."""
        order = np.random.default_rng(seed_for(seed, epoch)).permutation(self.count)
        return torch.from_numpy(order[: len(self) * self.batch_size].reshape(len(self), self.batch_size))


class ClassBalancedBatches:
    """B / K classes with K samples each; N // B batches an epoch.

    The classes go round in shuffled cycles: over an epoch each comes as often as any other, give or take one, and none
    comes twice in a batch. The K samples of a class are distinct; only a class that has fewer is drawn with replacement
    (as in the paper).

    Raises:
        UserError: the batch is larger than the data, no multiple of ``per_class``, or needs more classes than exist.
    """

    def __init__(self, labels: Int64[Tensor, "N"], batch_size: int, per_class: int = 4) -> None:
        self.count, self.batch_size, self.per_class = len(labels), _checked(batch_size, len(labels)), per_class
        values = labels.numpy()
        order = values.argsort(kind="stable")
        self.members = np.split(order, np.flatnonzero(np.diff(values[order])) + 1)
        if per_class < 1 or batch_size % per_class:
            raise UserError(
                f"expected a batch size that is a multiple of the {per_class} images per class, got {batch_size}; "
                "change one of the two"
            )
        if batch_size // per_class > len(self.members):
            largest = len(self.members) * per_class
            raise UserError(
                f"batch size {batch_size} with {per_class} images per class needs {batch_size // per_class} classes, "
                f"but the data set has {len(self.members)}; choose a batch size of at most {largest}"
            )

    def __len__(self) -> int:
        return self.count // self.batch_size

    def epoch(self, seed: int, epoch: int) -> Int64[Tensor, "steps B"]:
        """Sample numbers of each batch, those of a class side by side."""
        rng = np.random.default_rng(seed_for(seed, epoch))
        classes = self._classes(rng).ravel()
        rows = [self._draw(rng, self.members[c]) for c in classes]
        return torch.from_numpy(np.stack(rows).reshape(len(self), self.batch_size))

    def _draw(self, rng: np.random.Generator, members: np.ndarray) -> np.ndarray:
        return rng.choice(members, self.per_class, replace=len(members) < self.per_class)

    def _classes(self, rng: np.random.Generator) -> np.ndarray:
        """Class numbers [steps, B / K]: shuffled cycles through all classes, none twice in a row."""
        width = self.batch_size // self.per_class
        rows, waiting = [], np.empty(0, np.int64)
        for _ in range(len(self)):
            if len(waiting) < width:
                fresh = rng.permutation(len(self.members))
                # The batch is filled up with classes that it does not hold yet; these come later in the new cycle.
                again = np.isin(fresh, waiting)
                waiting = np.concatenate([waiting, fresh[~again], fresh[again]])
            rows.append(waiting[:width])
            waiting = waiting[width:]
        return np.stack(rows)


def _checked(batch_size: int, count: int) -> int:
    if not 1 <= batch_size <= count:
        raise UserError(f"expected a batch size from 1 to {count}, the number of training images, got {batch_size}")
    return batch_size
