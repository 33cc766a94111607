"""Sums over a queue that come block by block: log-sum-exp with an online softmax, and sums over positive pairs.

Axis legend: B anchors, D dimensions, b rows of a block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = -1e30
"""The logit of a pair that does not count: finite, so that differences are, and its exponential is 0."""
DEEP = -60.0
"""A logit so far below the largest one is raised to this: its exponential is lost in float64's rounding of the sum, and
is no denormal number, which would take a processor fifty times as long."""
LONGEST = 1e12
"""A row is made longer by this factor at most; so does ``torch.nn.functional.normalize``."""
TAME = 15.0
"""Logits that are all within this of 0 have exponentials that neither overflow nor are lost beside one another."""


class LogSumExp:
    """Log-sum-exp of logits that come block by block, and the mean of the unit rows with their softmax as weights.

    Args:
        unit: the anchors; sums are made with their precision, on their device.
        bound: no logit that counts is further from 0. Where it is ``TAME``, the largest logit need not be known.

    Attributes:
        nothing: the logit by which a block says that a pair does not count.
    """

    def __init__(self, unit: Tensor, bound: float) -> None:
        self.tame = bound <= TAME
        self.least = 0.5 * math.exp(-bound) if self.tame else 1.0  # less than the sum of one pair that counts
        self.nothing = DEEP if self.tame else FLOOR
        self.total, self.attended = unit.new_zeros(len(unit)), torch.zeros_like(unit)
        if not self.tame:
            self.peak = unit.new_full((len(unit), 1), FLOOR)  # the largest logit as yet

    def add(self, logits: Tensor, rows: Tensor, inverse: Tensor) -> None:
        """Takes in a block; overwrites its logits."""
        if not self.tame:
            self._raise_peak(logits.amax(1, keepdim=True))
            logits.sub_(self.peak).clamp_(min=DEEP)
        weights = logits.exp_()
        self.total.addmv_(weights, torch.ones_like(inverse))  # a sum over columns is slower where they lie in a row
        self.attended.addmm_(weights.mul_(inverse), rows)

    def add_few(self, logits: Tensor, kept: Tensor, rows: Tensor, inverse: Tensor) -> None:
        """Takes in the few pairs of a block that are kept, one by one: a product would mostly multiply by zero."""
        anchors, columns = kept.contiguous().nonzero().unbind(1)
        found = logits[anchors, columns]
        if not self.tame:
            self._raise_peak(self.peak[:, 0].scatter_reduce(0, anchors, found, "amax")[:, None])
            found.sub_(self.peak[anchors, 0]).clamp_(min=DEEP)
        weights = found.exp_()
        self.total.index_add_(0, anchors, weights)
        starts = torch.searchsorted(anchors, torch.arange(len(kept)))
        weights.mul_(inverse[columns])
        self.attended.add_(F.embedding_bag(columns, rows, starts, mode="sum", per_sample_weights=weights))

    def _raise_peak(self, largest: Tensor) -> None:
        """Makes the sums as yet relative to the largest logit [B, 1] of a block, where that is the largest so far."""
        peak = torch.maximum(self.peak, largest)
        shrink = (self.peak - peak).exp_()
        self.total.mul_(shrink[:, 0])
        self.attended.mul_(shrink)
        self.peak = peak

    def empty(self) -> Tensor:
        """[B] whether no pair of an anchor counts as yet."""
        return self.total < self.least if self.tame else self.peak[:, 0] == FLOOR

    def result(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp [B] and weighted mean [B, D]; FLOOR and 0 for an anchor of which no pair counts."""
        empty, total = self.empty(), self.total.clamp(min=self.least)
        logsumexp = total.log() if self.tame else total.log().add_(self.peak[:, 0])
        return logsumexp.masked_fill_(empty, FLOOR), (self.attended / total[:, None]).masked_fill_(empty[:, None], 0)


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
    """1 / length, and ``LONGEST`` for a row of zeros."""
    return lengths.reciprocal().clamp_(max=LONGEST)


def by_rows(by_unit: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient by rows, of that by the rows at unit length."""
    along = (by_unit * unit).sum(1, keepdim=True).masked_fill_(inverse == LONGEST, 0)
    return torch.addcmul(by_unit, along, unit, value=-1).mul_(inverse)
