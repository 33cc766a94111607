"""One pass over a queue: the log-sum-exp of similarities and the sum of the positive ones, with their gradients.

The gradient of a log-sum-exp of q.r_j / T by q is the mean of the rows r_j, weighted by the softmax of the logits,
over T. As in flash attention (arXiv 2205.14135) a block of rows is decoded, multiplied, added to running sums and
forgotten. Nothing of size M x D or B x M is kept. Gradient reaches the rows of the queue only through the affine map
that they follow (``memory.following``), for which further sums of the same size are kept.

Axis legend: B anchors, M queue rows, D dimensions, b rows of a block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.losses.pairs import NOT_COUNTED, Pairs, Rows

SAFE = 20.0  # exponentials of logits within this of 0 are added up as they are
LOWEST = -80.0  # exponents are raised to this, which is lost in a sum: a CPU is slow where exp underflows


class PairSums(NamedTuple):
    """Sums over the counted pairs of each anchor."""

    logsumexp: Float[Tensor, "B"]  # of the negative logits, with ``include_positives`` of the positive ones too
    positive_cosines: Float[Tensor, "B"]  # the sum of them
    positives: Int64[Tensor, "B"]
    negatives: Int64[Tensor, "B"]  # not counted without labels


def pair_sums(anchors: Float[Tensor, "B D"], pairs: Pairs, *, include_positives: bool = False) -> PairSums:
    """Return the sums of unit anchors, to which gradient flows.

    The log-sum-exp of an anchor without a counted pair is ``NOT_COUNTED``, and its gradient 0.
    """
    return PairSums(*_PairSums.apply(anchors, pairs, include_positives, *_followed(pairs)))


def positive_softplus(anchors: Float[Tensor, "B D"], offset: Float[Tensor, "B"], pairs: Pairs) -> Float[Tensor, "B"]:
    """Return the sum of log(1 + exp(offset - s)) over the logits s of each unit anchor's positive pairs.

    Gradient flows to the anchors and to the offset.
    """
    total: Tensor = _PositiveSoftplus.apply(anchors, offset, pairs, *_followed(pairs))
    return total


def _followed(pairs: Pairs) -> tuple[Tensor | None, ...]:
    """Return scale and shift of the map that the rows follow."""
    return (None, None) if pairs.following is None else pairs.following.map


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, pairs: Pairs, include_positives: bool, *followed: Tensor | None
    ) -> tuple[Tensor, ...]:
        softmax, positive_sum = _OnlineSoftmax(anchors, pairs), _WeightedSum(anchors, pairs)
        positives, negatives = torch.zeros(2, len(anchors), dtype=torch.int64, device=anchors.device).unbind()
        for rows, logits in pairs.negatives_only(anchors):
            if pairs.labels is not None:
                negatives.add_((logits > NOT_COUNTED).sum(1))
            softmax.add_(logits, rows)
        for rows, logits, positive, negative in pairs.mixed(anchors):
            positives.add_(positive.sum(1))
            negatives.add_(negative.sum(1))
            positive_sum.add_(positive.to(logits.dtype), rows, positive_sum.cosines(logits))
            counted = positive | negative if include_positives else negative
            softmax.add_(logits.masked_fill_(~counted, NOT_COUNTED), rows)
        logsumexp, mean_row, *by_map = softmax.result()
        positive_rows, *positive_by_map = positive_sum.result()
        ctx.save_for_backward(mean_row, *by_map, positive_rows, *positive_by_map)
        ctx.temperature = pairs.temperature
        ctx.mark_non_differentiable(positives, negatives)
        return logsumexp, (anchors * positive_rows).sum(1), positives, negatives

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        of_logsumexp, of_cosines = grads[0][:, None], grads[1][:, None]
        half = len(ctx.saved_tensors) // 2
        by_anchors, *by_map = (
            of_logsumexp * softmax_mean / ctx.temperature + of_cosines * positive_sum
            for softmax_mean, positive_sum in zip(ctx.saved_tensors[:half], ctx.saved_tensors[half:], strict=True)
        )
        return by_anchors, None, None, *_over_anchors(by_map)


class _PositiveSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, offset: Tensor, pairs: Pairs, *followed: Tensor | None) -> Tensor:
        total, slope, weighted = torch.zeros_like(offset), torch.zeros_like(offset), _WeightedSum(anchors, pairs)
        for rows, logits, positive, _ in pairs.mixed(anchors):
            cosines = weighted.cosines(logits)
            gap = offset[:, None] - logits
            total.add_((F.softplus(gap, threshold=40) * positive).sum(1))
            weights = gap.sigmoid_().mul_(positive)
            slope.add_(weights.sum(1))
            weighted.add_(weights, rows, cosines)
        ctx.save_for_backward(slope, *weighted.result())
        ctx.temperature = pairs.temperature
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        slope, *sums = ctx.saved_tensors
        by_anchors, *by_map = (grads[0][:, None] * values / -ctx.temperature for values in sums)
        return by_anchors, grads[0] * slope, None, *_over_anchors(by_map)


def refuse_second_derivative() -> None:
    """Raise where a graph of the gradient is made. ``once_differentiable`` misses the anchors' other ways to a loss."""
    if torch.is_grad_enabled():
        raise RuntimeError("expected create_graph=False: second derivatives need implementation='dense'")


def _over_anchors(by_map: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients by scale and shift, or None if no row follows a map."""
    return [values.sum(0) for values in by_map] or [None, None]


class _WeightedSum:
    """Sums over rows of weights [B, b]: of the unit rows u and, if rows follow a map, of the derivatives of cosines.

    A row r = n u that follows the map r * scale + shift, the identity, has for the cosine c with an anchor z::

        dc / dscale = z * u - c u * u,    dc / dshift = (z - c u) / n
    """

    def __init__(self, anchors: Float[Tensor, "B D"], pairs: Pairs) -> None:
        self.anchors, self.follows, self.temperature = anchors, pairs.following is not None, pairs.temperature
        self.sums = [torch.zeros_like(anchors)]  # of u
        if self.follows:  # and over constant rows of u, over all others of c u * u, c u / n and 1 / n
            self.sums += [*anchors.new_zeros(3, *anchors.shape).unbind(), anchors.new_zeros(len(anchors), 1)]

    def cosines(self, logits: Float[Tensor, "B b"]) -> Float[Tensor, "B b"] | None:
        """Return what ``add_`` needs of logits, before they are overwritten."""
        return (logits * self.temperature).clamp_(-1, 1) if self.follows else None

    def add_(self, weights: Float[Tensor, "B b"], rows: Rows, cosines: Float[Tensor, "B b"] | None) -> None:
        """Add a block."""
        self.sums[0].addmm_(weights, rows.unit)
        if cosines is None:
            return
        if rows.constant is not None:
            self.sums[1].addmm_(weights * rows.constant, rows.unit)
            weights = weights * ~rows.constant
        inverse = rows.length.to(weights.dtype).reciprocal()
        self.sums[4].addmm_(weights, inverse)
        weights = weights * cosines
        self.sums[2].addmm_(weights, rows.unit.square())
        self.sums[3].addmm_(weights.mul_(inverse.T), rows.unit)

    def mul_(self, factor: Float[Tensor, "B 1"]) -> None:
        """Multiply all sums."""
        for values in self.sums:
            values.mul_(factor)

    def result(self) -> list[Float[Tensor, "B D"]]:
        """Return the sum of the unit rows and, if rows follow a map, those of dc / dscale and dc / dshift."""
        if not self.follows:
            return self.sums
        unit, constant, squares, slopes, inverse = self.sums
        return [unit, self.anchors * (unit - constant) - squares, self.anchors * inverse - slopes]


class _OnlineSoftmax:
    """Add up exponentials of logits, and the rows weighted by them.

    Logits that may pass ``SAFE`` are taken relative to the largest so far, which takes 6 % longer.
    """

    def __init__(self, anchors: Tensor, pairs: Pairs) -> None:
        self.relative = 1 / pairs.temperature > SAFE
        self.peak = anchors.new_full((len(anchors), 1), NOT_COUNTED if self.relative else 0.0)
        self.total, self.weighted = anchors.new_zeros(len(anchors)), _WeightedSum(anchors, pairs)

    def add_(self, logits: Tensor, rows: Rows) -> None:
        """Add a block, whose logits are overwritten."""
        cosines = self.weighted.cosines(logits)
        if self.relative:
            peak = torch.maximum(self.peak, logits.amax(1, keepdim=True))
            shrink = (self.peak - peak).exp_()
            self.total.mul_(shrink[:, 0])
            self.weighted.mul_(shrink)
            self.peak = peak
            logits.sub_(peak)
        weights = logits.clamp_(min=LOWEST).exp_()
        self.total.addmv_(weights, rows.unit.new_ones(len(rows.unit)))  # faster than a sum over columns
        self.weighted.add_(weights, rows, cosines)

    def result(self) -> tuple[Tensor, ...]:
        """Return the log-sum-exp [B] and the softmax means of the sums' rows [B, D], which are 0 if no pair counts."""
        total = self.total[:, None]
        empty = (total < math.exp(-SAFE) / 2) | (self.peak == NOT_COUNTED)
        logsumexp = (self.peak + total.log()).masked_fill_(empty, NOT_COUNTED)[:, 0]
        return logsumexp, *((values / total).masked_fill_(empty, 0) for values in self.weighted.result())
