"""What the queue is made of: frames, blocks, sums over rows, and how a value is set that no one may look at.

Axis legend: M queue rows, D dimensions, b rows of a block, g groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from selfsup_xbn.memory.adaptation import Moments


class Frame(NamedTuple):
    """The map between stored rows and adapted rows. The only place that knows its form."""

    scale: Float[Tensor, "*b D"]
    shift: Float[Tensor, "*b D"]

    def __call__(self, rows: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        """Adapted rows of stored ones."""
        return torch.addcmul(self.shift, rows, self.scale)

    def inverse(self, rows: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        """Stored rows of adapted ones."""
        return (rows - self.shift).mul_(self.scale.reciprocal())

    def seen_from(self, other: Frame) -> Frame:
        """The map from rows that are stored in this frame to the same rows as the other one would store them."""
        return Frame(self.scale / other.scale, (self.shift - other.shift).div_(other.scale))

    @staticmethod
    def where(condition: Bool[Tensor, "b"], a: Frame, b: Frame) -> Frame:
        """A map for each row: ``a`` where the condition holds, ``b`` elsewhere."""
        choose = condition[:, None]
        return Frame(torch.where(choose, a.scale, b.scale), torch.where(choose, a.shift, b.shift))


class AffineMap(NamedTuple):
    """The map from stored rows to adapted rows: ``rows * scale + shift``."""

    scale: Float[Tensor, "D"]
    shift: Float[Tensor, "D"]

    def __call__(self, rows: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """Map stored rows to embeddings."""
        return torch.addcmul(self.shift, rows, self.scale)


class Block(NamedTuple):
    """Some slots of the queue as a loss reads them: stored rows, before ``FeatureQueue.affine_map()``.

    The rows are valid until the next block is read. ``valid`` is None where every slot holds a row.
    """

    slots: slice | Int64[Tensor, "b"]
    rows: Float[Tensor, "b D"]
    labels: Int64[Tensor, "b"] | None
    valid: Bool[Tensor, "b"] | None


class Trace(NamedTuple):
    """What the last ``adapt`` saw: moments of the batch and of the queue, and how it moved the queue, if it did."""

    batch: Moments
    before: Moments
    move: Frame | None

    @property
    def after(self) -> Moments:
        """Moments of the queue once it was moved."""
        return (
            self.before
            if self.move is None
            else Moments(self.move(self.before.mean), self.before.std * self.move.scale)
        )


def power_sums(rows: Float[Tensor, "b D"], groups: Bool[Tensor, "g b"] | None = None) -> Float64[Tensor, "2 *g D"]:
    """Sums of the rows and of their squares ([1, 2 power]), over all of them or over each of some groups."""
    rows = rows.double()
    if groups is None:
        return torch.stack([rows.sum(0), (rows * rows).sum(0)])
    weights = groups.double()
    return torch.stack([weights @ rows, weights @ (rows * rows)])


def may_wait(tensor: Tensor) -> bool:
    """Whether shapes may depend on values here: on a CPU, where nothing is waited for, and not when compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def assign_(buffer: Tensor, value: Tensor, condition: Bool[Tensor, "*_"]) -> None:
    """``buffer[...] = value`` where the condition, which lives on the device, holds."""
    torch.where(condition, value, buffer, out=buffer)
