"""Sums over a queue that come block by block: log-sum-exp with an online softmax, and sums over positive pairs.

Axis legend: B anchors, D dimensions, b rows of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = -1e30
"""The logit of a pair that does not count: finite, so that differences are, and its exponential is 0."""
DEEP = -60.0
"""A logit so far below the largest one is raised to this: its exponential is lost in float64's rounding of the sum, and
is no denormal number, which would take a processor fifty times as long."""


class LogSumExp:
    """Log-sum-exp of logits that come block by block, and the mean of the unit rows with their softmax as weights."""

    def __init__(self, unit: Tensor) -> None:
        self.peak = unit.new_full((len(unit), 1), FLOOR)  # the largest logit as yet
        self.total, self.attended = torch.zeros_like(self.peak), torch.zeros_like(unit)

    def add(self, logits: Tensor, rows: Tensor, inverse: Tensor) -> None:
        """Takes in a block; overwrites its logits."""
        peak = torch.maximum(self.peak, logits.amax(1, keepdim=True))
        shrink = (self.peak - peak).exp_()
        weights = logits.sub_(peak).clamp_(min=DEEP).exp_()
        self.total.mul_(shrink).add_(weights.sum(1, keepdim=True))
        self.attended.mul_(shrink).addmm_(weights.mul_(inverse), rows)
        self.peak = peak

    def result(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp [B] and weighted mean [B, D]; FLOOR and 0 for an anchor of which no pair counts."""
        total = self.total.clamp(min=1)  # it is at least 1 where any pair counts
        empty = self.peak == FLOOR  # its sums are of pairs that do not count
        return (self.peak + total.log())[:, 0], (self.attended / total).masked_fill_(empty, 0)


class Positives:
    """Sums over each anchor's positive pairs: their number, their losses, and the rows times the losses' slopes.

    A pair's loss is its logit s, or softplus(negatives - s) where the log-sum-exp of the anchor's negatives is given.
    """

    def __init__(self, unit: Tensor, negatives: Tensor | None = None) -> None:
        self.negatives, self.rows = negatives, torch.zeros_like(unit)
        self.count, self.sum, self.slope = unit.new_zeros(3, len(unit)).unbind()

    def add(self, positive: Tensor, logits: Tensor, rows: Tensor, inverse: Tensor) -> None:
        """Takes in the positive pairs of a block."""
        loss, slope = logits, positive.to(logits.dtype)
        self.count.add_(slope.sum(1))
        if self.negatives is not None:
            gap = self.negatives[:, None] - logits
            loss, slope = F.softplus(gap, threshold=40), -gap.sigmoid() * slope
            self.slope.add_(slope.sum(1))
        self.sum.add_(loss.masked_fill(~positive, 0).sum(1))
        self.rows.addmm_(slope * inverse, rows)


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows at unit length, and what they were multiplied by [B, 1]."""
    inverse = inverse_of(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    return rows * inverse, inverse


def inverse_of(lengths: Tensor) -> Tensor:
    """1 / length, and a large number for a row of zeros."""
    return lengths.clamp(min=1e-12).reciprocal_()


def by_rows(by_unit: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient by rows, of that by the rows at unit length."""
    along = (by_unit * unit).sum(1, keepdim=True)
    return torch.addcmul(by_unit, along, unit, value=-1).mul_(inverse)
