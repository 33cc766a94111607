"""The Triton kernels of SupCon in ``sup_con_kernels.py``.

Axis legend: B anchors, M queue rows, D dimensions, E own rows of an anchor, S parts of the queue. Sizes with a P are
padded: MP to a multiple of 16, the others to a power of two. Logits are to base two.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from selfsup_xbn.losses._triton import (
    _bounds,
    _decoded,
    _halves,
    _own_range,
    _through_unit,
    _times,
    _unit_vector,
    _without_own,
)


@triton.jit
@no_type_check
def compare(
    anchors, rows, scale, shift, written, labels, row_labels, own, logits, lengths, peaks, totals, positive_logits,
    positives, negatives, B, M, MP, S, part, factor, below, above, D: tl.constexpr, E: tl.constexpr, BB: tl.constexpr,
    BM: tl.constexpr, DK: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Write the logits of a block of anchors and one part of the queue, and what each anchor adds up over them.

    Dimensions are multiplied DK at a time, with the squares of the lengths beside the products. The logit of a pair
    that does not count is -1e30. ``lengths`` receives one over the lengths of the embeddings.
    """
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    bm = b < B
    y = tl.load(labels + b, mask=bm, other=0)
    peak, total = tl.full([BB], -1e29, tl.float32), tl.zeros([BB], tl.float32)
    positive_logit = tl.zeros([BB], tl.float32)
    positive_count, negative_count = tl.zeros([BB], tl.int32), tl.zeros([BB], tl.int32)
    if E > 0:
        lowest, highest = _own_range(own, b, bm, M, E)
    start, stop = _bounds(tl.program_id(1), part, M, written)
    for first in range(start, stop, BM):
        m = first + tl.arange(0, BM)
        mm = m < stop
        products = tl.zeros([BB, BM], tl.float32)
        x_squares, r_squares = tl.zeros([BB], tl.float32), tl.zeros([BM], tl.float32)
        for j in tl.range(tl.cdiv(D, DK), num_stages=STAGES):
            d = j * DK + tl.arange(0, DK)
            at = anchors + b[:, None] * D + d[None, :]
            x = tl.load(at, mask=bm[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            r = _decoded(rows, scale, shift, first, mm, d, BM, D)
            x_squares += tl.sum(x * x, 1)
            r_squares += tl.sum(r * r, 1)
            if EXACT:  # the tensor cores cut off what they add up: each part is added in float32
                products += tl.dot(x, tl.trans(r), input_precision="tf32x3")
            else:
                products = tl.dot(x, tl.trans(r), products, input_precision="tf32")
        inverse = 1.0 / tl.maximum(tl.sqrt(r_squares), 1e-12)
        logit = products * (factor / tl.maximum(tl.sqrt(x_squares), 1e-12))[:, None] * inverse[None, :]
        logit = tl.where(mm[None, :], logit, -1e30)
        if E > 0:  # noqa: SIM102
            if (first + BM > lowest) & (first <= highest):
                logit = _without_own(logit, own, b, bm, m, E)
        same = y[:, None] == tl.load(row_labels + m, mask=mm, other=0)[None, :]
        present = logit != -1e30
        positive = present & same & ((logit >= below) == 0)  # true for NaN, which must reach the loss
        negative = present & (same == 0) & ((logit <= above) == 0)
        positive_count += tl.sum(positive.to(tl.int32), 1)
        negative_count += tl.sum(negative.to(tl.int32), 1)
        positive_logit += tl.sum(tl.where(positive, logit, 0.0), 1)
        logit = tl.where(positive | negative, logit, -1e30)
        tl.store(lengths + m, inverse, mask=mm)
        tl.store(logits + b.to(tl.int64)[:, None] * MP + m[None, :], logit, mask=bm[:, None] & mm[None, :])
        largest = tl.maximum(peak, tl.max(logit, 1))
        total = total * tl.exp2(peak - largest) + tl.sum(tl.exp2(logit - largest[:, None]), 1)
        peak = largest
    o = b * S + tl.program_id(1)
    tl.store(peaks + o, peak, mask=bm)
    tl.store(totals + o, total, mask=bm)
    tl.store(positive_logits + o, positive_logit, mask=bm)
    tl.store(positives + o, positive_count, mask=bm)
    tl.store(negatives + o, negative_count, mask=bm)


@triton.jit
@no_type_check
def combine(
    peaks, totals, positive_logits, positives, negatives, losses, log_sums, all_positives, all_negatives, S, SP:
    tl.constexpr
):  # fmt: skip
    """Make the loss of one anchor, its log-sum-exp, and its numbers of positive and negative pairs."""
    b, s = tl.program_id(0), tl.arange(0, SP)
    o, inside = b * S + s, s < S
    peak = tl.load(peaks + o, mask=inside, other=-1e30)
    top = tl.max(peak, 0)
    total = tl.sum(tl.exp2(peak - top) * tl.load(totals + o, mask=inside, other=0.0), 0)
    positive = tl.sum(tl.load(positives + o, mask=inside, other=0), 0)
    positive_logit = tl.sum(tl.load(positive_logits + o, mask=inside, other=0.0), 0)
    log_sum = tl.where(total == 0, -1e30, top + tl.log2(tl.where(total == 0, 1.0, total)))
    tl.store(losses + b, (log_sum - positive_logit / tl.maximum(positive, 1)) * 0.6931471805599453)
    tl.store(log_sums + b, tl.where(total == 0, 0.0, log_sum))
    tl.store(all_positives + b, positive)
    tl.store(all_negatives + b, tl.sum(tl.load(negatives + o, mask=inside, other=0), 0))


@triton.jit
@no_type_check
def weigh(
    rows, scale, shift, written, labels, row_labels, logits, lengths, log_sums, positives, sums, B, M, MP, part, D:
    tl.constexpr, BB: tl.constexpr, BM: tl.constexpr, DV: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Add up DV dimensions of the unit rows of one part of the queue, for a block of anchors.

    The weight of a row is its share of the softmax, less its share of the positive pairs. It is multiplied by 2**15:
    small weights stay normal in float16.
    """
    v = tl.program_id(0) * DV + tl.arange(0, DV)
    b = tl.program_id(1) * BB + tl.arange(0, BB)
    bm = b < B
    y = tl.load(labels + b, mask=bm, other=0)
    log_sum = tl.load(log_sums + b, mask=bm, other=0.0) - 15.0
    share = 32768.0 / tl.maximum(tl.load(positives + b, mask=bm, other=1), 1).to(tl.float32)
    total = tl.zeros([BB, DV], tl.float32)
    start, stop = _bounds(tl.program_id(2), part, M, written)
    for first in tl.range(start, stop, BM, num_stages=STAGES):
        m = first + tl.arange(0, BM)
        mm = m < stop
        at = logits + b.to(tl.int64)[:, None] * MP + m[None, :]
        logit = tl.load(at, mask=bm[:, None] & mm[None, :], other=-1e30)
        positive = (y[:, None] == tl.load(row_labels + m, mask=mm, other=0)[None, :]) & (logit != -1e30)
        weight = tl.exp2(logit - log_sum[:, None]) - tl.where(positive, share[:, None], 0.0)
        weight, weight_rest = _halves(weight)
        inverse = tl.load(lengths + m, mask=mm, other=0.0)
        r, r_rest = _halves(_decoded(rows, scale, shift, first, mm, v, BM, D) * inverse[:, None])
        if EXACT:
            total += _times(weight, weight_rest, r, r_rest, tl.zeros([BB, DV], tl.float32), EXACT)
        else:
            total = _times(weight, weight_rest, r, r_rest, total, EXACT)
    at = sums + (tl.program_id(2) * B + b).to(tl.int64)[:, None] * D + v[None, :]
    tl.store(at, total, mask=bm[:, None] & (v < D)[None, :])


@triton.jit
@no_type_check
def finish_sup_con(z, sums, losses, grad, B, S, inverse_t, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr):
    """Make the gradient of one anchor from the sums over each part [S, B, D]. Add NaN to its loss if it has one."""
    b, d = tl.program_id(0), tl.arange(0, DP)
    total = tl.zeros([DP], tl.float32)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        at = (s * B + b).to(tl.int64)[:, None] * D + d[None, :]
        total += tl.sum(tl.load(sums + at, mask=(s < S)[:, None] & (d < D)[None, :], other=0.0), 0)
    x, inverse = _unit_vector(z + b * D, d, D)
    tl.store(losses + b, tl.load(losses + b) + tl.sum(x * 0.0, 0))  # also of an anchor without pairs
    tl.store(grad + b * D + d, _through_unit(total * (inverse_t / 32768.0), x, inverse), mask=d < D)


@triton.jit
@no_type_check
def average(losses, positives, negatives, loss, weights, sums, B, BP: tl.constexpr):
    """Average the losses of the anchors that count; make the weight of each anchor and the number of all pairs."""
    b = tl.arange(0, BP)
    each = tl.load(losses + b, mask=b < B, other=0.0)
    positive = tl.load(positives + b, mask=b < B, other=0)
    negative = tl.load(negatives + b, mask=b < B, other=0)
    all_negative = tl.sum(negative.to(tl.int64), 0)
    averaged = ((each <= 0) == 0) & (positive > 0) & (positive + negative > 1) & (all_negative > 0)
    averaged = averaged | ((each == each) == 0)  # NaN reaches the loss
    weight = averaged.to(tl.float32) / tl.maximum(tl.sum(averaged.to(tl.int32), 0), 1)
    tl.store(loss, tl.sum(tl.where(averaged, each * weight, 0.0), 0))
    tl.store(weights + b, weight, mask=b < B)
    tl.store(sums, tl.sum(positive.to(tl.int64), 0))
    tl.store(sums + 1, all_negative)
