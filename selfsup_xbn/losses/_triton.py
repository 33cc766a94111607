"""The Triton kernels of InfoNCE in ``kernels.py``.

Axis legend: B anchors, M queue rows, D dimensions, E own rows of an anchor, S parts of the queue. Sizes with a P are
padded to a power of two.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _unit(x):
    """Return rows of unit length, as ``torch.nn.functional.normalize`` does."""
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]


@triton.jit
@no_type_check
def _times(a, a_rest, b, b_rest, total, EXACT: tl.constexpr):
    """Return total + a @ b, with the float16 parts of both factors."""
    total = tl.dot(a, b, total)
    if EXACT:
        total = tl.dot(a, b_rest, total)
        total = tl.dot(a_rest, b, total)
    return total


@triton.jit
@no_type_check
def _halves(x):
    """Return a number as the sum of two in float16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
@no_type_check
def _decoded(rows, scale, shift, first, inside, d, BM: tl.constexpr, D: tl.constexpr):
    """Return dimensions d of the embeddings that the rows from first on stand for."""
    at = rows + tl.cast(first, tl.int64) * D + tl.arange(0, BM)[:, None] * D + d[None, :]
    r = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    a = tl.load(scale + d, mask=d < D, other=0.0).to(tl.float32)
    return r * a[None, :] + tl.load(shift + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
@no_type_check
def _bounds(s, part, M, written):
    """Return the first row of part s of the queue, and the end of its written rows."""
    start = s * part
    return start, tl.minimum(start + part, tl.minimum(M, tl.load(written))).to(tl.int32)


@triton.jit
@no_type_check
def _own_range(own, b, bm, M, E: tl.constexpr):
    """Return the lowest and the highest own slot of anchors b, or M and -1 for none."""
    lowest, highest = M + 0, -1
    for e in tl.static_range(E):
        slot = tl.load(own + b * E + e, mask=bm, other=-1).to(tl.int32)
        lowest = tl.minimum(lowest, tl.min(tl.where(slot < 0, M, slot), 0))
        highest = tl.maximum(highest, tl.max(slot, 0))
    return lowest, highest


@triton.jit
@no_type_check
def _without_own(logits, own, b, bm, m, E: tl.constexpr):
    """Return the logits of anchors b and rows m, -1e30 for the own slots of an anchor."""
    for e in tl.static_range(E):
        slot = tl.load(own + b * E + e, mask=bm, other=-1).to(tl.int32)
        logits = tl.where(slot[:, None] == m[None, :], -1e30, logits)
    return logits


@triton.jit
@no_type_check
def scan(
    anchors, rows, scale, shift, written, own, peaks, totals, weighted, B, M, part, factor, D: tl.constexpr, DP:
    tl.constexpr, E: tl.constexpr, BB: tl.constexpr, BM: tl.constexpr, DV: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Add up one part of the queue, and DV dimensions of its rows, for a block of anchors. Logits are to base two."""
    d, b = tl.arange(0, DP), tl.program_id(0) * BB + tl.arange(0, BB)
    dm, bm = d < D, b < B
    x = tl.load(anchors + b[:, None] * D + d[None, :], mask=bm[:, None] & dm[None, :], other=0.0).to(tl.float32)
    x, x_rest = _halves(_unit(x) * factor)
    a = tl.load(scale + d, mask=dm, other=0.0).to(tl.float32)
    c = tl.load(shift + d, mask=dm, other=0.0).to(tl.float32)
    peak = tl.full([BB], -1e29, tl.float32)
    total = tl.zeros([BB], tl.float32)
    v = tl.program_id(2) * DV + tl.arange(0, DV)
    both = bm[:, None] & (v < D)[None, :]
    sums = tl.zeros([BB, DV], tl.float32)
    if E > 0:
        lowest, highest = _own_range(own, b, bm, M, E)
    start, stop = _bounds(tl.program_id(1), part, M, written)
    for first in range(start, stop, BM):
        m = first + tl.arange(0, BM)
        mm = m < stop
        at = rows + m.to(tl.int64)[:, None] * D + d[None, :]
        r = tl.load(at, mask=mm[:, None] & dm[None, :], other=0.0).to(tl.float32)
        r = r * a[None, :] + c[None, :]
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(r * r, 1)), 1e-12)
        r, r_rest = _halves(r * inverse[:, None])
        logits = _times(x, x_rest, tl.trans(r), tl.trans(r_rest), tl.zeros([BB, BM], tl.float32), EXACT)
        logits = tl.where(mm[None, :], logits, -1e30)
        if E > 0:  # noqa: SIM102
            if (first + BM > lowest) & (first <= highest):
                logits = _without_own(logits, own, b, bm, m, E)
        largest = tl.maximum(peak, tl.max(logits, 1))
        p = tl.exp2(logits - largest[:, None] + 10.0)  # up to 1024: small ones stay normal in float16
        shrink = tl.exp2(peak - largest)
        total = total * shrink + tl.sum(p, 1)
        p, p_rest = _halves(p)
        if DV < DP:
            r, r_rest = _halves(_decoded(rows, scale, shift, first, mm, v, BM, D) * inverse[:, None])
        if EXACT:  # the tensor cores cut off what they add up: each tile is added in float32
            sums = sums * shrink[:, None] + _times(p, p_rest, r, r_rest, tl.zeros([BB, DV], tl.float32), EXACT)
        else:
            sums = _times(p, p_rest, r, r_rest, sums * shrink[:, None], EXACT)
        peak = largest
    o = tl.program_id(1) * B + b
    tl.store(peaks + o, peak, mask=bm)
    tl.store(totals + o, total, mask=bm)
    tl.store(weighted + o[:, None] * D + v[None, :], sums, mask=both)


@triton.jit
@no_type_check
def _combined(b, peaks, totals, weighted, B, S, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, BS: tl.constexpr):
    """Return the log-sum-exp of anchor b over all parts, and the mean of the rows weighted by the softmax."""
    s, d = tl.arange(0, SP), tl.arange(0, DP)
    peak = tl.load(peaks + s * B + b, mask=s < S, other=-1e30)
    top = tl.max(peak, 0)
    total = tl.sum(tl.exp2(peak - top) * tl.load(totals + s * B + b, mask=s < S, other=0.0), 0)
    mean = tl.zeros([DP], tl.float32)
    for first in range(0, S, BS):
        t = first + tl.arange(0, BS)
        weight = tl.exp2(tl.load(peaks + t * B + b, mask=t < S, other=-1e30) - top)
        at = (t * B + b).to(tl.int64)[:, None] * D + d[None, :]
        part = tl.load(weighted + at, mask=(t < S)[:, None] & (d < D)[None, :], other=0.0)
        mean += tl.sum(part * weight[:, None], 0)
    empty = total == 0
    log_sum = tl.where(empty, -1e30, (top + tl.log2(tl.where(empty, 1.0, total)) - 10.0) * 0.6931471805599453)
    return log_sum, tl.where(empty, 0.0, mean / tl.where(empty, 1.0, total))


@triton.jit
@no_type_check
def _unit_vector(at, d, D: tl.constexpr):
    """Return a vector of unit length, and one over its length."""
    x = tl.load(at + d, mask=d < D, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 0))
    inverse = tl.where(length > 0.0, 1.0 / tl.maximum(length, 1e-12), 0.0)  # a row of zeros has gradient 0
    return x * inverse, inverse


@triton.jit
@no_type_check
def _through_unit(by, unit, inverse):
    """Return the gradient by a vector, given that by its direction."""
    return (by - unit * tl.sum(by * unit, 0)) * inverse


@triton.jit
@no_type_check
def _log1p(x):
    """Return log(1 + x) for x from 0 to 1, exact for small x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
@no_type_check
def finish_info_nce(
    q, k, peaks, totals, weighted, losses, grad_q, grad_k, B, S, inverse_t, D: tl.constexpr, DP: tl.constexpr, SP:
    tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """Make the loss of one query, over B, and its gradients by query and key."""
    b, d = tl.program_id(0), tl.arange(0, DP)
    x, x_inverse = _unit_vector(q + b * D, d, D)
    y, y_inverse = _unit_vector(k + b * D, d, D)
    log_sum, mean = _combined(b, peaks, totals, weighted, B, S, D, DP, SP, BS)
    gap = log_sum - tl.sum(x * y, 0) * inverse_t
    e = tl.exp(-tl.abs(gap))
    tl.store(losses + b, (tl.maximum(gap, 0.0) + _log1p(e)) / B)
    slope = tl.where(gap > 0, 1.0, e) / (1.0 + e) * inverse_t / B
    tl.store(grad_q + b * D + d, _through_unit((mean - y) * slope, x, x_inverse), mask=d < D)
    tl.store(grad_k + b * D + d, _through_unit(-x * slope, y, y_inverse), mask=d < D)
