"""The Triton kernels of ``kernels.py``.

Axis legend: B batch, C channels, H height, W width, S splits, P parts of a split. A row is a pixel of an image, and n
the number of rows of a split. Sizes with a second P are padded to a power of two.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _split_rows(j, B, S, HW):
    """Return the first row of split j and the number of its rows. The first splits are the larger ones."""
    rest = B % S
    first = (B // S) * j + tl.minimum(j, rest)
    return first * HW, (B // S + (j < rest).to(tl.int32)) * HW


@triton.jit
@no_type_check
def _offsets(r, c, HW, C, CHANNELS_LAST: tl.constexpr):
    """Return the offsets of channels c of rows r in memory."""
    if CHANNELS_LAST:
        at = r.to(tl.int64)[:, None] * C + c[None, :]
    else:
        at = ((r // HW).to(tl.int64) * C * HW + r % HW)[:, None] + c.to(tl.int64)[None, :] * HW
    return at


@triton.jit
@no_type_check
def _merged(count, mean, square):
    """Return mean and sum of squared deviations of all groups, from those of each group (Chan et al., 1979)."""
    total = tl.maximum(tl.sum(count, 0), 1.0)
    merged = tl.sum(mean * count[:, None], 0) / total
    deviation = mean - merged[None, :]
    return merged, tl.sum(square + deviation * deviation * count[:, None], 0)


@triton.jit
@no_type_check
def _split_statistics(parts, j, n, c, cm, part, P, S, C, PP: tl.constexpr):
    """Return mean and sum of squared deviations of split j, of n rows, from those of its parts."""
    p = tl.arange(0, PP)
    count = tl.minimum(tl.maximum(n - p * part, 0), part).to(tl.float32)
    at = parts + (p * S + j)[:, None] * C + c[None, :]
    inside = (p < P)[:, None] & cm[None, :]
    mean = tl.load(at, mask=inside, other=0.0)
    square = tl.load(at + P * S * C, mask=inside, other=0.0)
    return _merged(count, mean, square)


@triton.jit
@no_type_check
def statistics(
    x,
    parts,
    B,
    HW,
    C,
    S,
    P,
    part,
    CHANNELS_LAST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Store mean and sum of squared deviations of a part of a split (Welford, 1962, in each lane)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    j, p = tl.program_id(1), tl.program_id(2)
    start, n = _split_rows(j, B, S, HW)
    count = tl.zeros([BR], tl.float32)
    mean, square = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
    for first in range(p * part, tl.minimum((p + 1) * part, n), BR):
        r = first + tl.arange(0, BR)
        inside = (r < n)[:, None] & (c < C)[None, :]
        value = tl.load(x + _offsets(start + r, c, HW, C, CHANNELS_LAST), mask=inside, other=0.0).to(tl.float32)
        count += (r < n).to(tl.float32)
        change = tl.where(inside, value - mean, 0.0)
        mean += change * (1.0 / tl.maximum(count, 1.0))[:, None]
        square += change * (value - mean)
    part_mean, part_square = _merged(count, mean, square)
    at = parts + (p * S + j) * C + c
    tl.store(at, part_mean, mask=c < C)
    tl.store(at + P * S * C, part_square, mask=c < C)


@triton.jit
@no_type_check
def _update(at, value, momentum, mask):
    """Move a running average towards a value."""
    tl.store(at, tl.load(at, mask=mask, other=0.0).to(tl.float32) * (1 - momentum) + value * momentum, mask=mask)


@triton.jit
@no_type_check
def normalize(
    x,
    parts,
    weight,
    bias,
    y,
    saved,
    running_mean,
    running_var,
    tracked,
    B,
    HW,
    C,
    S,
    P,
    part,
    momentum,
    eps,
    AFFINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PP: tl.constexpr,
):
    """Normalize a part of a split. The first program of a split saves its statistics, that of a channel the running."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    cm = c < C
    j, p = tl.program_id(1), tl.program_id(2)
    start, n = _split_rows(j, B, S, HW)
    mean, square = _split_statistics(parts, j, n, c, cm, part, P, S, C, PP)
    inverse = 1.0 / tl.sqrt(square / n + eps)
    scale, shift = inverse, tl.zeros([BC], tl.float32)
    if AFFINE:
        scale = inverse * tl.load(weight + c, mask=cm, other=0.0).to(tl.float32)
        shift = tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)
    for first in range(p * part, tl.minimum((p + 1) * part, n), BR):
        r = first + tl.arange(0, BR)
        inside = (r < n)[:, None] & cm[None, :]
        at = _offsets(start + r, c, HW, C, CHANNELS_LAST)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, (value - mean[None, :]) * scale[None, :] + shift[None, :], mask=inside)
    if p == 0:
        tl.store(saved + j * C + c, mean, mask=cm)
        tl.store(saved + (S + j) * C + c, inverse, mask=cm)
        if j == 0:
            means, variances = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
            for k in range(S):
                start, n = _split_rows(k, B, S, HW)
                mean, square = _split_statistics(parts, k, n, c, cm, part, P, S, C, PP)
                means += mean
                variances += square / (n - 1)
            _update(running_mean + c, means / S, momentum, cm)
            _update(running_var + c, variances / S, momentum, cm)
            if tl.program_id(0) == 0:
                tl.store(tracked, tl.load(tracked) + 1)


@triton.jit
@no_type_check
def gradient_sums(
    x,
    gradient,
    saved,
    parts,
    B,
    HW,
    C,
    S,
    P,
    part,
    CHANNELS_LAST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Store the sums over a part of a split of the gradient, and of its product with the normalized input."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    cm = c < C
    j, p = tl.program_id(1), tl.program_id(2)
    start, n = _split_rows(j, B, S, HW)
    mean = tl.load(saved + j * C + c, mask=cm, other=0.0)
    inverse = tl.load(saved + (S + j) * C + c, mask=cm, other=0.0)
    total, product = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
    for first in range(p * part, tl.minimum((p + 1) * part, n), BR):
        r = first + tl.arange(0, BR)
        inside = (r < n)[:, None] & cm[None, :]
        at = _offsets(start + r, c, HW, C, CHANNELS_LAST)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        total += slope
        product += slope * ((value - mean[None, :]) * inverse[None, :])
    at = parts + (p * S + j) * C + c
    tl.store(at, tl.sum(total, 0), mask=cm)
    tl.store(at + P * S * C, tl.sum(product, 0), mask=cm)


@triton.jit
@no_type_check
def _split_sums(parts, j, c, cm, P, S, C, PP: tl.constexpr):
    """Return the sums of ``gradient_sums`` over split j."""
    p = tl.arange(0, PP)
    at = parts + (p * S + j)[:, None] * C + c[None, :]
    inside = (p < P)[:, None] & cm[None, :]
    total = tl.sum(tl.load(at, mask=inside, other=0.0), 0)
    return total, tl.sum(tl.load(at + P * S * C, mask=inside, other=0.0), 0)


@triton.jit
@no_type_check
def input_gradient(
    x,
    gradient,
    saved,
    parts,
    weight,
    grad_x,
    grad_weight,
    grad_bias,
    B,
    HW,
    C,
    S,
    P,
    part,
    AFFINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PP: tl.constexpr,
):
    """Store the gradient of a part of a split. The first program of a channel stores those of weight and bias."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    cm = c < C
    j, p = tl.program_id(1), tl.program_id(2)
    start, n = _split_rows(j, B, S, HW)
    total, product = _split_sums(parts, j, c, cm, P, S, C, PP)
    mean = tl.load(saved + j * C + c, mask=cm, other=0.0)
    inverse = tl.load(saved + (S + j) * C + c, mask=cm, other=0.0)
    scale = inverse
    if AFFINE:
        scale = inverse * tl.load(weight + c, mask=cm, other=0.0).to(tl.float32)
    for first in range(p * part, tl.minimum((p + 1) * part, n), BR):
        r = first + tl.arange(0, BR)
        inside = (r < n)[:, None] & cm[None, :]
        at = _offsets(start + r, c, HW, C, CHANNELS_LAST)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        slope -= (total / n)[None, :] + (value - mean[None, :]) * (inverse * product / n)[None, :]
        tl.store(grad_x + at, slope * scale[None, :], mask=inside)
    if AFFINE:  # noqa: SIM102
        if (j == 0) & (p == 0):
            total, product = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
            for k in range(S):
                split_total, split_product = _split_sums(parts, k, c, cm, P, S, C, PP)
                total += split_total
                product += split_product
            tl.store(grad_bias + c, total, mask=cm)
            tl.store(grad_weight + c, product, mask=cm)
