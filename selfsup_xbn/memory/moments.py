"""Moments of embeddings, the power sums that tell them, and the affine map that changes them.

This is the only module that knows the form of the map. It is the paper's Eq. 6, one scale and one shift per dimension.
A full D x D map (Eq. 10) replaces the standard deviations, the second power sums and the scale here by matrices.

Axis legend: B batch, D dimensions, b rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

PIECE = 2**18
"""Numbers that are held in another precision at a time: 1 MB in float32."""


class Moments(NamedTuple):
    """Mean and unbiased standard deviation of each dimension.

    Example:
        >>> Moments(torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.0])).constant()
        tensor([False,  True])
    """

    mean: Float[Tensor, "D"]
    std: Float[Tensor, "D"]

    def constant(self) -> Bool[Tensor, "D"]:
        """Return whether the spread of a dimension is within float32's rounding of its mean; False for NaN."""
        return self.std <= self.mean.abs().mul_(1e-6).add_(1e-12)

    @staticmethod
    def from_power_sums(sums: Float[Tensor, "2 D"], count: Int64[Tensor, ""]) -> Moments:
        """Return the moments of ``count`` rows from ``power_sums`` of them.

        A single row has a deviation of 0. No rows have mean 0 and deviation 1, as standardized rows have.
        """
        first, second = sums.unbind()
        mean = first / count.clamp(min=1)
        squares = torch.addcmul(second, mean, first, value=-1).clamp_(min=0)
        std = squares.div_((count - 1).clamp_(min=1)).sqrt_()
        return Moments(mean, torch.where(count == 0, 1.0, std))


class AdaptRecord(NamedTuple):
    """The moments of one ``adapt``: of the batch, and of the queue before and after it."""

    batch: Moments
    before: Moments
    after: Moments


def batch_moments(batch: Float[Tensor, "B D"], dtype: torch.dtype = torch.float64) -> Moments:
    """Return the moments of a batch of at least two rows, without gradient.

    Args:
        batch: rows in any floating point dtype.
        dtype: precision of the result and of all sums.

    Example:
        >>> batch_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).mean
        tensor([2., 0.], dtype=torch.float64)
    """
    rows = batch.detach().to(dtype)
    mean = rows.mean(0)
    rows = rows - mean  # two passes are exact and, on a CPU, four times as fast as torch.var_mean
    return Moments(mean, rows.mul_(rows).sum(0).div_(len(rows) - 1).sqrt_())


def power_sums(rows: Float[Tensor, "b D"], dtype: torch.dtype) -> Float[Tensor, "2 D"]:
    """Return the sums over the rows of z and of z**2, in the given precision."""
    pieces = (z.to(dtype) for z in rows.split(max(1, PIECE // rows.shape[1])))
    return functools.reduce(torch.add, (torch.stack([z.sum(0), (z * z).sum(0)]) for z in pieces))


class AffineMap(NamedTuple):
    """The map ``z -> z * scale + shift`` from the rows that a queue stores to the embeddings that they stand for.

    Example:
        >>> affine_map = AffineMap(scale=torch.tensor([2.0]), shift=torch.tensor([1.0]))
        >>> affine_map(torch.tensor([[3.0]]))
        tensor([[7.]])
        >>> affine_map.inverse(torch.tensor([[7.0]]))
        tensor([[3.]])
    """

    scale: Float[Tensor, "D"]
    shift: Float[Tensor, "D"]

    def __call__(self, rows: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """Map stored rows to embeddings."""
        return torch.addcmul(self.shift, rows, self.scale)

    def inverse(self, embeddings: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """Map embeddings to the rows that are stored for them."""
        return (embeddings - self.shift).mul_(self.scale.reciprocal())

    def moments(self, stored: Moments) -> Moments:
        """Return the moments of the embeddings, given those of the stored rows."""
        return Moments(torch.addcmul(self.shift, stored.mean, self.scale), stored.std * self.scale)

    def after(self, first: AffineMap) -> AffineMap:
        """Return the composition that applies ``first`` and then this map."""
        return AffineMap(first.scale * self.scale, torch.addcmul(self.shift, first.shift, self.scale))

    def to(self, dtype: torch.dtype) -> AffineMap:
        """Return a copy of the map in another precision."""
        return AffineMap(self.scale.to(dtype, copy=True), self.shift.to(dtype, copy=True))

    @staticmethod
    def identity(dim: int, dtype: torch.dtype, device: torch.device | str | None = None) -> AffineMap:
        """Return the map that changes nothing."""
        return AffineMap(torch.ones(dim, dtype=dtype, device=device), torch.zeros(dim, dtype=dtype, device=device))

    @staticmethod
    def between(current: Moments, target: Moments) -> AffineMap:
        """Return Eq. 6: ``R -> (R - current.mean) / current.std * target.std + target.mean``.

        A dimension that is constant in either is shifted and not scaled.
        """
        constant = current.constant().logical_or_(target.constant())
        scale = (target.std / current.std).masked_fill_(constant, 1)
        return AffineMap(scale, torch.addcmul(target.mean, scale, current.mean, value=-1))

    def standardizing(self, stored: Moments) -> AffineMap:
        """Return the map whose inverse standardizes stored rows of these moments.

        A dimension whose embeddings are constant under this map is centered and not scaled.
        """
        return AffineMap(stored.std.masked_fill(self.moments(stored).constant(), 1), stored.mean)
