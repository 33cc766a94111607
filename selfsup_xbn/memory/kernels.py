"""Adapt and enqueue as Triton kernels: one launch each, for XBM, XBN and AXBN.

Each program updates some dimensions. A batch with a non-finite value changes none of them, so each program checks the
whole batch. The last program to end updates the counters.

Axis legend: B batch, M queue rows, D dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.memory.adaptation import AXBN, XBM, XBN

if TYPE_CHECKING:
    from selfsup_xbn.memory.feature_queue import FeatureQueue

BD = 4  # dimensions of a program
AT_A_TIME = 2**14  # numbers of the whole batch that a program reads at a time


@triton.jit
@no_type_check
def _is_last(ticket, programs):
    """Return whether all other programs have ended."""
    return tl.atomic_add(ticket, 1) == programs - 1


@triton.jit
@no_type_check
def _constant(mean, std):
    """Return what ``Moments.constant`` does."""
    return std <= tl.abs(mean) * 1e-6 + 1e-12


@triton.jit
@no_type_check
def _adapt(
    batch,
    scale,
    shift,
    sums,
    written,
    est_mean,
    est_std,
    variance,
    gain,
    step,
    ticket,
    B,
    M,
    q,
    r,
    interval,
    D: tl.constexpr,
    FILTER: tl.constexpr,
    LITERAL: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
):
    """Compose Eq. 6 onto scale and shift of BD dimensions."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    dm = d < D
    bad = tl.zeros([RP], tl.int32)
    e = tl.arange(0, DP)
    for first in range(0, B, RP):
        b = first + tl.arange(0, RP)
        x = tl.load(batch + b[:, None] * D + e[None, :], mask=(b < B)[:, None] & (e < D)[None, :], other=0.0)
        bad += tl.sum(((tl.abs(x.to(tl.float32)) < float("inf")) == 0).to(tl.int32), 1)
    finite = tl.sum(bad, 0) == 0
    total = tl.zeros([BB, BD], tl.float64)
    for first in range(0, B, BB):
        b = first + tl.arange(0, BB)
        inside = (b < B)[:, None] & dm[None, :]
        total += tl.load(batch + b[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    mean = tl.sum(total, 0) / B
    total = tl.zeros([BB, BD], tl.float64)
    for first in range(0, B, BB):
        b = first + tl.arange(0, BB)
        inside = (b < B)[:, None] & dm[None, :]
        x = tl.load(batch + b[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        total += tl.where(inside, (x - mean[None, :]) * (x - mean[None, :]), 0.0)
    std = tl.sqrt(tl.sum(total, 0) / (B - 1))
    if FILTER:  # Eqs. 18 to 22; see ``AXBN``
        seen = tl.load(step)
        k, p = tl.load(gain), tl.load(variance)
        if finite & (seen > 0) & ((seen - 1) % interval == 0):
            predicted = p + q
            k = predicted / (predicted + r / B)
            p = (1 - k) * (p if LITERAL else predicted)
        weight = tl.where(seen == 0, 1.0, k)
        old_mean = tl.load(est_mean + d, mask=dm, other=0.0)
        old_std = tl.load(est_std + d, mask=dm, other=0.0)
        mean = tl.where(finite, old_mean + weight * (mean - old_mean), old_mean)
        std = tl.where(finite, old_std + weight * (std - old_std), old_std)
        tl.store(est_mean + d, mean, mask=dm)
        tl.store(est_std + d, std, mask=dm)
    w = tl.load(written)
    n = tl.minimum(w, M)
    s = tl.load(scale + d, mask=dm, other=1.0)
    h = tl.load(shift + d, mask=dm, other=0.0)
    sum1, sum2 = tl.load(sums + d, mask=dm, other=0.0), tl.load(sums + D + d, mask=dm, other=0.0)
    center = sum1 / tl.maximum(n, 1).to(tl.float64)
    spread = tl.sqrt(tl.maximum(sum2 - center * sum1, 0.0) / tl.maximum(n - 1, 1).to(tl.float64))
    spread = tl.where(n == 0, 1.0, spread) * s
    center = h + center * s
    keep = _constant(center, spread) | _constant(mean, std)
    factor = tl.where(keep, 1.0, std / tl.where(keep, 1.0, spread))  # Eq. 6
    moved = finite & (w != 1)
    tl.store(scale + d, tl.where(moved, s * factor, s), mask=dm)
    tl.store(shift + d, tl.where(moved, mean - factor * center + h * factor, h), mask=dm)
    if FILTER:  # noqa: SIM102
        if _is_last(ticket, tl.num_programs(0)):
            tl.store(ticket, 0)
            tl.store(gain, k)
            tl.store(variance, p)
            tl.store(step, seen + finite.to(tl.int64))


@triton.jit
@no_type_check
def _enqueue(
    batch,
    labels,
    rows,
    row_labels,
    scale,
    shift,
    sums,
    written,
    offered,
    skipped,
    slots,
    ticket,
    B,
    M,
    D: tl.constexpr,
    MOVES: tl.constexpr,
    CLASSES: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
):
    """Write BD dimensions of the batch over the oldest rows, and update their power sums."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    dm = d < D
    bad = tl.zeros([RP], tl.int32)
    e = tl.arange(0, DP)
    all_shift = tl.load(shift + e, mask=e < D, other=0.0).to(tl.float32)
    all_inverse = 1.000001 / tl.load(scale + e, mask=e < D, other=1.0).to(tl.float32)  # above what rounding does
    for first in range(0, B, RP):
        b = first + tl.arange(0, RP)
        inside = (b < B)[:, None] & (e < D)[None, :]
        x = tl.load(batch + b[:, None] * D + e[None, :], mask=inside, other=0.0).to(tl.float32)
        x = ((x - all_shift[None, :]) * all_inverse[None, :]).to(rows.dtype.element_ty).to(tl.float32)
        bad += tl.sum((((tl.abs(x) < float("inf")) == 0) & inside).to(tl.int32), 1)
    finite = tl.sum(bad, 0) == 0
    w = tl.load(written)
    kept = tl.minimum(B, M)
    lost = B - kept
    inverse = 1.0 / tl.load(scale + d, mask=dm, other=1.0)
    h = tl.load(shift + d, mask=dm, other=0.0)
    change1, change2 = tl.zeros([BB, BD], tl.float64), tl.zeros([BB, BD], tl.float64)
    for first in range(0, B, BB):
        b = first + tl.arange(0, BB)
        slot = (w + b - lost) % M
        fits = (b >= lost) & (b < B)
        inside = fits[:, None] & dm[None, :]
        x = tl.load(batch + b[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        stored = ((x - h[None, :]) * inverse[None, :]).to(tl.float32).to(rows.dtype.element_ty)
        at = rows + slot[:, None] * D + d[None, :]
        if MOVES:
            old = tl.load(at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
            new = tl.where(inside, stored.to(tl.float32).to(tl.float64), 0.0)
            change1 += new - old
            change2 += new * new - old * old
        tl.store(at, stored, mask=inside & finite)
        if tl.program_id(0) == 0:
            tl.store(slots + b, tl.where(finite & fits, slot, -1), mask=b < B)
            if CLASSES:
                label = tl.load(labels + b, mask=fits, other=0)
                tl.store(row_labels + slot, label, mask=fits & finite)
    if MOVES:
        at = sums + d
        change = tl.where(finite, tl.sum(change1, 0), 0.0)
        tl.store(at, tl.load(at, mask=dm, other=0.0) + change, mask=dm)
        change = tl.where(finite, tl.sum(change2, 0), 0.0)
        tl.store(at + D, tl.load(at + D, mask=dm, other=0.0) + change, mask=dm)
    if _is_last(ticket, tl.num_programs(0)):
        tl.store(ticket, 0)
        tl.store(written, w + tl.where(finite, kept, 0))
        tl.store(offered, tl.load(offered) + kept)
        tl.store(skipped, tl.load(skipped) + (finite == 0).to(tl.int64))


def supports(queue: FeatureQueue, batch: Tensor) -> bool:
    """Return whether the kernels take this batch and this queue: an adaptation of the paper, and no float64 rows."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    fits = batch.dtype in types and queue.rows.dtype in types and type(queue.rows) is Tensor
    fits = fits and batch.device == queue.rows.device
    return fits and type(queue.adaptation) in (XBM, XBN, AXBN) and queue.sums.dtype == torch.float64


def adapt(queue: FeatureQueue, batch: Float[Tensor, "B D"]) -> None:
    """Do what ``FeatureQueue.adapt`` does, for a batch of at least two rows and a queue that moves."""
    (B, D), axbn = batch.shape, queue.adaptation
    state = (queue.sums, queue.sums, queue.sums, queue.sums, queue.written)  # not read
    q, r, interval, literal = 0.0, 0.0, 1, False
    if isinstance(axbn, AXBN):
        state = (axbn.mean, axbn.std, axbn.variance, axbn.gain, axbn.step)
        q, r, interval, literal = axbn.q, axbn.r, axbn.gain_interval, axbn.literal
    _adapt[(triton.cdiv(D, BD),)](
        batch.contiguous(),
        queue.scale,
        queue.shift,
        queue.sums,
        queue.written,
        *state,
        queue.ticket,
        B,
        queue.size,
        float(q),
        float(r),
        interval,
        D=D,
        FILTER=isinstance(axbn, AXBN),
        LITERAL=literal,
        **_tiles(B, D),
    )


def enqueue(
    queue: FeatureQueue, batch: Float[Tensor, "B D"], labels: Int64[Tensor, "B"] | None = None
) -> Int64[Tensor, "B"]:
    """Do what ``FeatureQueue.enqueue`` does, without the refresh."""
    B, D = batch.shape
    slots = torch.empty(B, dtype=torch.int64, device=batch.device)
    _enqueue[(triton.cdiv(D, BD),)](
        batch.contiguous(),
        slots if labels is None else labels.to(queue.rows.device, torch.int64).contiguous(),
        queue.rows,
        slots if queue.labels is None else queue.labels,
        queue.scale,
        queue.shift,
        queue.sums,
        queue.written,
        queue.offered,
        queue.skipped,
        slots,
        queue.ticket,
        B,
        queue.size,
        D=D,
        MOVES=queue.adaptation.moves_queue,
        CLASSES=labels is not None,
        **_tiles(B, D),
    )
    return slots


def _tiles(batch: int, dim: int) -> dict[str, int]:
    """Return the sizes of a program: rows and dimensions at a time, and those at a time where it reads all.

    With 1,024 threads each of them has its share of ``AT_A_TIME`` numbers in flight at once, in four loads.
    """
    padded, rows = triton.next_power_of_2(dim), triton.next_power_of_2(batch)
    whole = max(1, min(rows, AT_A_TIME // padded))
    return {"BB": min(rows, 256), "BD": BD, "DP": padded, "RP": whole, "num_warps": 32}
