"""The sums of a loss over a queue whose rows are shared out among processes.

Every process passes the same anchors. Each computes the sums over its rows, and the sums are combined: forward by an
all-reduce of the log-sum-exps [B] (and for SupCon of the positive cosines [B]), backward by one of the gradient [B, D].

Axis legend: B anchors, D dimensions.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from selfsup_xbn.losses.blockwise import PairSums
from selfsup_xbn.losses.pairs import NOT_COUNTED, Pairs
from selfsup_xbn.utils.distributed import all_sum, peers, sum_gradient, world


class AcrossShards:
    """The functions of ``losses.blockwise`` for a ``ShardedQueue``.

    Args:
        read: Module that computes the sums over the rows of this process.
    """

    def __init__(self, read: ModuleType) -> None:
        self.read = read

    def pair_sums(self, anchors: Float[Tensor, "B D"], pairs: Pairs, *, include_positives: bool = False) -> PairSums:
        """Return what ``blockwise.pair_sums`` does, over the rows of all processes."""
        own = self.read.pair_sums(sum_gradient(anchors), pairs, include_positives=include_positives)
        logsumexp = _LogSumExp.apply(own.logsumexp)
        if pairs.labels is None:  # there are no positives, and negatives are not counted
            return PairSums(logsumexp, *own[1:])
        positives, negatives = all_sum(torch.stack([own.positives, own.negatives]))
        return PairSums(logsumexp, _Sum.apply(own.positive_cosines), positives, negatives)

    def positive_softplus(
        self, anchors: Float[Tensor, "B D"], offset: Float[Tensor, "B"], pairs: Pairs
    ) -> Float[Tensor, "B"]:
        """Return what ``blockwise.positive_softplus`` does, over the rows of all processes."""
        total: Tensor = _Sum.apply(self.read.positive_softplus(sum_gradient(anchors), sum_gradient(offset), pairs))
        return total


class _Sum(torch.autograd.Function):
    """The sum over the processes, which all of them use in the same way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_sum(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _LogSumExp(torch.autograd.Function):
    """The logarithm of the sum of exponentials over the processes, which all of them use in the same way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.detach().clamp(min=NOT_COUNTED)  # a shard without rows has -inf, if its sums are dense
        peak = values.clone()
        if world() > 1:
            with peers():
                dist.all_reduce(peak, dist.ReduceOp.MAX)
        total = peak + all_sum((values - peak).exp()).log()
        ctx.save_for_backward((values - total).exp())
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (share,) = ctx.saved_tensors
        return grads[0] * share
