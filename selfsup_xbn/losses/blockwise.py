"""One pass over a queue: the log-sum-exp of similarities with its gradient, and the sum of the positive rows.

The gradient of a log-sum-exp of q.r_j / T by q is the mean of the rows r_j, weighted by the softmax of the logits,
over T. As in flash attention (arXiv 2205.14135) a block of rows is decoded, multiplied, added to running sums and
forgotten. Nothing of size M x D or B x M is kept, and no gradient reaches the queue.

Axis legend: B anchors, M queue rows, D dimensions, b rows of a block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.losses.pairs import NOT_COUNTED, Pairs

SAFE = 20.0  # exponentials of logits within this of 0 are added up as they are
LOWEST = -80.0  # exponents are raised to this, which is lost in a sum: a CPU is slow where exp underflows


class PairSums(NamedTuple):
    """Sums over the counted pairs of each anchor."""

    logsumexp: Float[Tensor, "B"]  # of the negative logits, with ``include_positives`` of the positive ones too
    positive_rows: Float[Tensor, "B D"]  # the sum of the unit rows
    positives: Int64[Tensor, "B"]
    negatives: Int64[Tensor, "B"]  # not counted without labels


def pair_sums(anchors: Float[Tensor, "B D"], pairs: Pairs, *, include_positives: bool = False) -> PairSums:
    """Return the sums of unit anchors, to which gradient flows through the log-sum-exp.

    The log-sum-exp of an anchor without a counted pair is ``NOT_COUNTED``, and its gradient 0.
    """
    return PairSums(*_PairSums.apply(anchors, pairs, include_positives))


def positive_softplus(anchors: Float[Tensor, "B D"], offset: Float[Tensor, "B"], pairs: Pairs) -> Float[Tensor, "B"]:
    """Return the sum of log(1 + exp(offset - s)) over the logits s of each unit anchor's positive pairs.

    Gradient flows to the anchors and to the offset.
    """
    total: Tensor = _PositiveSoftplus.apply(anchors, offset, pairs)
    return total


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, pairs: Pairs, include_positives: bool) -> tuple[Tensor, ...]:
        softmax, positive_rows = _OnlineSoftmax(anchors, pairs.temperature), torch.zeros_like(anchors)
        positives, negatives = torch.zeros(2, len(anchors), dtype=torch.int64, device=anchors.device).unbind()
        for rows, logits in pairs.negatives_only(anchors):
            if pairs.labels is not None:
                negatives.add_((logits > NOT_COUNTED).sum(1))
            softmax.add_(logits, rows)
        for rows, logits, positive, negative in pairs.mixed(anchors):
            positives.add_(positive.sum(1))
            negatives.add_(negative.sum(1))
            positive_rows.addmm_(positive.to(rows.dtype), rows)
            counted = positive | negative if include_positives else negative
            softmax.add_(logits.masked_fill_(~counted, NOT_COUNTED), rows)
        logsumexp, mean_row = softmax.result()
        ctx.save_for_backward(mean_row)
        ctx.temperature = pairs.temperature
        ctx.mark_non_differentiable(positive_rows, positives, negatives)
        return logsumexp, positive_rows, positives, negatives

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (mean_row,) = ctx.saved_tensors
        return grads[0][:, None] * mean_row / ctx.temperature, None, None


class _PositiveSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, offset: Tensor, pairs: Pairs) -> Tensor:
        total, slope, weighted_rows = torch.zeros_like(offset), torch.zeros_like(offset), torch.zeros_like(anchors)
        for rows, logits, positive, _ in pairs.mixed(anchors):
            gap = offset[:, None] - logits
            total.add_((F.softplus(gap, threshold=40) * positive).sum(1))
            weights = gap.sigmoid_().mul_(positive)
            slope.add_(weights.sum(1))
            weighted_rows.addmm_(weights, rows)
        ctx.save_for_backward(slope, weighted_rows)
        ctx.temperature = pairs.temperature
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        slope, weighted_rows = ctx.saved_tensors
        return grads[0][:, None] * weighted_rows / -ctx.temperature, grads[0] * slope, None


def refuse_second_derivative() -> None:
    """Raise where a graph of the gradient is made. ``once_differentiable`` misses the anchors' other ways to a loss."""
    if torch.is_grad_enabled():
        raise RuntimeError("expected create_graph=False: second derivatives need implementation='dense'")


class _OnlineSoftmax:
    """Add up exponentials of logits, and the rows weighted by them.

    Logits that may pass ``SAFE`` are taken relative to the largest so far, which takes 6 % longer.
    """

    def __init__(self, anchors: Tensor, temperature: float) -> None:
        self.relative = 1 / temperature > SAFE
        self.peak = anchors.new_full((len(anchors), 1), NOT_COUNTED if self.relative else 0.0)
        self.total, self.weighted_rows = anchors.new_zeros(len(anchors)), torch.zeros_like(anchors)

    def add_(self, logits: Tensor, rows: Tensor) -> None:
        """Add a block, whose logits are overwritten."""
        if self.relative:
            peak = torch.maximum(self.peak, logits.amax(1, keepdim=True))
            shrink = (self.peak - peak).exp_()
            self.total.mul_(shrink[:, 0])
            self.weighted_rows.mul_(shrink)
            self.peak = peak
            logits.sub_(peak)
        weights = logits.clamp_(min=LOWEST).exp_()
        self.total.addmv_(weights, rows.new_ones(len(rows)))  # faster than a sum over columns
        self.weighted_rows.addmm_(weights, rows)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the log-sum-exp [B] and the softmax mean of the rows [B, D], which is 0 if no pair counts."""
        total = self.total[:, None]
        empty = (total < math.exp(-SAFE) / 2) | (self.peak == NOT_COUNTED)
        logsumexp = (self.peak + total.log()).masked_fill_(empty, NOT_COUNTED)[:, 0]
        return logsumexp, (self.weighted_rows / total).masked_fill_(empty, 0)
