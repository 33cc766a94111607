"""SupCon of a batch against a queue as Triton kernels.

They read the queue twice, because embeddings of supervised learning have many dimensions, whose sums would not fit the
registers beside the products. The first pass writes the logits, and adds up their exponentials. The second pass adds up
the rows with the weights that the gradient has. ``LOGITS`` bounds the memory: larger batches are taken in blocks of
anchors.

Axis legend: B anchors, M queue rows, D dimensions, E own rows of an anchor, S and S2 parts of the queue in
the two passes. Sizes with a P are padded: MP to a multiple of 16, the others to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from selfsup_xbn.losses._launch import (
    LOG2E,
    empty,
    is_exact,
    own_rows,
    padded,
    parts_at_a_time,
    processors,
    queue_of,
    rows_per_anchor,
    split,
)
from selfsup_xbn.losses._triton_sup_con import average, combine, compare, finish_sup_con, weigh
from selfsup_xbn.losses.blockwise import refuse_second_derivative
from selfsup_xbn.losses.pairs import Pairs

LOGITS = 2**24
"""How many logits are kept at a time, but for the least block of 64 anchors."""


def sup_con(
    embeddings: Float[Tensor, "B D"], pairs: Pairs
) -> tuple[Float[Tensor, ""], Int64[Tensor, ""], Int64[Tensor, ""]]:
    """Return SupCon of embeddings of any length, and the numbers of positive and of negative pairs."""
    loss, sums = _SupCon.apply(embeddings, pairs)
    return loss, sums[0], sums[1]


class _SupCon(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        assert pairs.labels is not None
        z, labels, own = embeddings.contiguous(), pairs.labels.contiguous(), own_rows(pairs)
        losses, weights, loss, grad = (empty(z, *shape) for shape in ((len(z),), (len(z), 1), (), z.shape))
        positives, negatives = torch.empty((2, len(z)), dtype=torch.int32, device=z.device)
        pair_counts = torch.empty(2, dtype=torch.int64, device=z.device)
        at_a_time = max(64, LOGITS // queue_of(pairs).size // 64 * 64)
        for first in range(0, len(z), at_a_time):
            block = slice(first, first + at_a_time)
            inputs = z[block], labels[block], None if own is None else own[block]
            _two_passes(pairs, *inputs, losses[block], positives[block], negatives[block], grad[block])
        average[(1,)](
            losses, positives, negatives, loss, weights, pair_counts, len(z), BP=triton.next_power_of_2(len(z))
        )
        ctx.save_for_backward(grad, weights)
        ctx.dtype = z.dtype
        ctx.mark_non_differentiable(pair_counts)
        return loss, pair_counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        grad, weights = ctx.saved_tensors
        return (grad * (weights * grads[0])).to(ctx.dtype), None


def _two_passes(
    pairs: Pairs,
    z: Float[Tensor, "B D"],
    labels: Int64[Tensor, "B"],
    own: Int64[Tensor, "B *E"] | None,
    losses: Float[Tensor, "B"],
    positives: Int32[Tensor, "B"],
    negatives: Int32[Tensor, "B"],
    grad: Float[Tensor, "B D"],
) -> None:
    """Write the losses of a block of anchors, their numbers of pairs, and their gradients."""
    queue = queue_of(pairs)
    (B, D), M = z.shape, queue.size
    DP, MP, BB = padded(D), triton.cdiv(M, 16) * 16, max(16, min(triton.next_power_of_2(B), 64))
    blocks, programs = triton.cdiv(B, BB), 2 * processors(z.device)
    rows, slices = 128 if 64 * programs <= M else 64, triton.cdiv(D, 128)
    S, part = split(M, rows, programs // blocks)
    S2, part2 = split(M, 32, programs // (blocks * slices))
    logits, lengths, log_sums = empty(z, B, MP), empty(z, M), empty(z, B)
    by_part = empty(z, 3, B, S)
    pairs_by_part = torch.empty((2, B, S), dtype=torch.int32, device=z.device)
    compare[blocks, S](
        z,
        queue.rows,
        queue.scale,
        queue.shift,
        queue.written,
        labels,
        queue.labels,
        queue.written if own is None else own,
        logits,
        lengths,
        *by_part,
        *pairs_by_part,
        B,
        M,
        MP,
        S,
        part,
        LOG2E / pairs.temperature,
        max(min(pairs.below * LOG2E, 1e29), -1e29),
        max(min(pairs.above * LOG2E, 1e29), -1e29),
        D=D,
        E=rows_per_anchor(own, B),
        BB=BB,
        BM=rows,
        DK=min(DP, 32),
        EXACT=is_exact(),
        STAGES=3,
    )
    combine[(B,)](
        *by_part,
        *pairs_by_part,
        losses,
        log_sums,
        positives,
        negatives,
        S,
        SP=triton.next_power_of_2(S),
    )
    sums = empty(z, S2, B, D)
    weigh[slices, blocks, S2](
        queue.rows,
        queue.scale,
        queue.shift,
        queue.written,
        labels,
        queue.labels,
        logits,
        lengths,
        log_sums,
        positives,
        sums,
        B,
        M,
        MP,
        part2,
        D=D,
        BB=BB,
        BM=32,
        DV=min(DP, 128),
        EXACT=is_exact(),
        STAGES=3,
    )
    finish_sup_con[(B,)](z, sums, losses, grad, B, S2, 1 / pairs.temperature, D=D, DP=DP, BS=parts_at_a_time(S2, D))
