"""InfoNCE and SupCon of a batch against a queue as Triton kernels.

InfoNCE takes two launches, whatever M is. The first kernel is flash attention (arXiv 2205.14135) with the rows of the
queue as keys and as values, split over the queue as in flash decoding: a program takes a block of anchors and a part of
the queue. It decodes a tile of rows by the queue's affine map, divides them by their length, multiplies, and adds up
exponentials and rows relative to the largest logit so far. The second kernel combines the parts of each query, and
computes its loss and gradient.

SupCon reads the queue twice, because embeddings of supervised learning have many dimensions, whose sums would not fit
the registers beside the products. The first pass writes the logits, and adds up their exponentials. The second pass
adds up the rows with the weights that the gradient has. ``LOGITS`` bounds the memory: larger batches are taken in
blocks of anchors.

The tensor cores multiply in float16 or TF32, which have 11 significant bits. If
``torch.get_float32_matmul_precision()`` is "highest" (torch's default), the products of the rounding errors are added
(``EXACT``, 22 bits), and sums are kept in float32: the results are those of float32, and the products take up to three
times as long. "high" and "medium" leave them out.

Axis legend: B anchors, M queue rows, D dimensions, E own rows of an anchor, S parts of the queue. Sizes with a P are
padded to a power of two.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from selfsup_xbn.losses._triton import finish_info_nce, scan
from selfsup_xbn.losses._triton_sup_con import average, combine, compare, finish_sup_con, weigh
from selfsup_xbn.losses.blockwise import refuse_second_derivative
from selfsup_xbn.losses.pairs import Pairs
from selfsup_xbn.memory.feature_queue import FeatureQueue

LOG2E = math.log2(math.e)
MAX_DIM = 512  # InfoNCE keeps unit queries in shared memory
MIN_TEMPERATURE = 1e-4  # InfoNCE keeps unit queries over the temperature in float16
LOGITS = 2**24
"""How many logits SupCon keeps at a time, but for the least block of 64 anchors."""


class Tiles(NamedTuple):
    """Sizes of the first kernel: of a block of anchors, of a tile of rows, and of the dimensions that it adds up."""

    anchors: int
    rows: int
    values: int
    parts: int
    warps: int
    stages: int

    @staticmethod
    def of(B: int, M: int, DP: int, device: torch.device, exact: bool) -> Tiles:
        """Return sizes whose sums fit the registers and whose programs fill the device once."""
        anchors = max(16, min(triton.next_power_of_2(B), 128 if DP <= 128 else 64))
        rows = 64 if DP <= 128 else 32
        values = min(DP, 256 if exact else 512)
        parts = max(1, min(triton.cdiv(M, rows), _processors(device) // (triton.cdiv(B, anchors) * DP // values)))
        stages = (1 if DP > 256 else 2) if exact else (2 if DP > 256 else 3)
        return Tiles(anchors, rows, values, parts, 8 if anchors >= 64 else 4, stages)


class Pass(NamedTuple):
    """Sizes of a pass of SupCon: of a tile of rows, of the dimensions at a time, and how many parts of which length."""

    rows: int
    dims: int
    parts: int
    part: int

    @staticmethod
    def of(M: int, rows: int, dims: int, programs: int) -> Pass:
        """Return the sizes for about this number of programs."""
        part = triton.cdiv(triton.cdiv(M, max(1, programs)), rows) * rows
        return Pass(rows, dims, triton.cdiv(M, part), part)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class _Sums(NamedTuple):
    """Sums of the first kernel over each part of the queue."""

    peaks: Float[Tensor, "SB"]
    totals: Float[Tensor, "SB"]
    weighted: Float[Tensor, "SBD"]
    parts: int


def _queue(pairs: Pairs) -> FeatureQueue:
    assert pairs.queue is not None
    return pairs.queue


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _at_a_time(parts: int, dim: int) -> int:
    """Return how many parts' sums a program loads at a time."""
    return min(triton.next_power_of_2(parts), max(1, 2**13 // _padded(dim)))


def _empty(like: Tensor, *shape: int) -> Float[Tensor, "..."]:
    return like.new_empty(shape, dtype=torch.float32)


def _own(pairs: Pairs) -> Int64[Tensor, "B *E"] | None:
    return None if pairs.self_indices is None else pairs.self_indices.contiguous()


def _per_anchor(own: Int64[Tensor, "B *E"] | None, B: int) -> int:
    """Return E."""
    return 0 if own is None else own.numel() // B


def supports(embeddings: Tensor, queue: FeatureQueue, temperature: float) -> bool:
    """Return whether the kernels take these embeddings and this queue: no float64, at most ``MAX_DIM`` dimensions."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    fits = len(embeddings) > 0 and queue.dim <= MAX_DIM and temperature >= MIN_TEMPERATURE
    fits = fits and embeddings.device == queue.rows.device
    return fits and embeddings.dtype in types and queue.rows.dtype in types and type(queue.rows) is Tensor


def info_nce(q: Float[Tensor, "B D"], k: Float[Tensor, "B D"], pairs: Pairs) -> Float[Tensor, ""]:
    """Return InfoNCE of queries and keys of any length; see ``functional.info_nce``."""
    loss: Tensor = _InfoNCE.apply(q, k, pairs)
    return loss


def sup_con(
    embeddings: Float[Tensor, "B D"], pairs: Pairs
) -> tuple[Float[Tensor, ""], Int64[Tensor, ""], Int64[Tensor, ""]]:
    """Return SupCon of embeddings of any length, and the numbers of positive and of negative pairs."""
    loss, sums = _SupCon.apply(embeddings, pairs)
    return loss, sums[0], sums[1]


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, pairs: Pairs) -> Tensor:
        q, k = q.contiguous(), k.contiguous()
        (B, D), sums = q.shape, _scan(q, pairs)
        losses, grad_q, grad_k = (q.new_empty(shape, dtype=torch.float32) for shape in ((B,), (B, D), (B, D)))
        finish_info_nce[(B,)](
            q,
            k,
            *sums[:3],
            losses,
            grad_q,
            grad_k,
            B,
            sums.parts,
            1 / pairs.temperature,
            D=D,
            DP=_padded(D),
            SP=triton.next_power_of_2(sums.parts),
            BS=_at_a_time(sums.parts, D),
        )
        ctx.save_for_backward(grad_q, grad_k)
        ctx.types = q.dtype, k.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        return *(
            (grads[0] * saved).to(dtype) if needed else None
            for saved, dtype, needed in zip(ctx.saved_tensors, ctx.types, ctx.needs_input_grad[:2], strict=True)
        ), None


class _SupCon(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        assert pairs.labels is not None
        z, labels, own = embeddings.contiguous(), pairs.labels.contiguous(), _own(pairs)
        losses, weights, loss, grad = (_empty(z, *shape) for shape in ((len(z),), (len(z), 1), (), z.shape))
        positives, negatives = torch.empty((2, len(z)), dtype=torch.int32, device=z.device)
        pair_counts = torch.empty(2, dtype=torch.int64, device=z.device)
        at_a_time = max(64, LOGITS // _queue(pairs).size // 64 * 64)
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


def _scan(anchors: Float[Tensor, "B D"], pairs: Pairs) -> _Sums:
    """Run the first kernel of InfoNCE."""
    queue, own = _queue(pairs), _own(pairs)
    B, D = anchors.shape
    exact = torch.get_float32_matmul_precision() == "highest"
    tiles = Tiles.of(B, queue.size, _padded(D), anchors.device, exact)
    part = triton.cdiv(triton.cdiv(queue.size, tiles.parts), tiles.rows) * tiles.rows
    S = triton.cdiv(queue.size, part)
    sizes = [S * B * D, S * B, S * B]
    weighted, peaks, totals = anchors.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    scan[triton.cdiv(B, tiles.anchors), S, _padded(D) // tiles.values](
        anchors,
        queue.rows,
        queue.scale,
        queue.shift,
        queue.written,
        queue.written if own is None else own,
        peaks,
        totals,
        weighted,
        B,
        queue.size,
        part,
        LOG2E / pairs.temperature,
        D=D,
        DP=_padded(D),
        E=_per_anchor(own, B),
        BB=tiles.anchors,
        BM=tiles.rows,
        DV=tiles.values,
        EXACT=exact,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return _Sums(peaks, totals, weighted, S)


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
    queue = _queue(pairs)
    (B, D), M, exact = z.shape, queue.size, torch.get_float32_matmul_precision() == "highest"
    DP, MP, BB = _padded(D), triton.cdiv(M, 16) * 16, max(16, min(triton.next_power_of_2(B), 64))
    blocks, programs = triton.cdiv(B, BB), 2 * _processors(z.device)
    first = Pass.of(M, 128 if 64 * programs <= M else 64, min(DP, 32), programs // blocks)
    slices = triton.cdiv(D, 128)
    second = Pass.of(M, 32, min(DP, 128), programs // (blocks * slices))
    logits, lengths, log_sums = _empty(z, B, MP), _empty(z, M), _empty(z, B)
    by_part = _empty(z, 3, B, first.parts)
    pairs_by_part = torch.empty((2, B, first.parts), dtype=torch.int32, device=z.device)
    compare[blocks, first.parts](
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
        first.parts,
        first.part,
        LOG2E / pairs.temperature,
        max(min(pairs.below * LOG2E, 1e29), -1e29),
        max(min(pairs.above * LOG2E, 1e29), -1e29),
        D=D,
        E=_per_anchor(own, B),
        BB=BB,
        BM=first.rows,
        DK=first.dims,
        EXACT=exact,
        STAGES=3,
    )
    combine[(B,)](
        *by_part,
        *pairs_by_part,
        losses,
        log_sums,
        positives,
        negatives,
        first.parts,
        SP=triton.next_power_of_2(first.parts),
    )
    sums = _empty(z, second.parts, B, D)
    weigh[slices, blocks, second.parts](
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
        second.part,
        D=D,
        BB=BB,
        BM=second.rows,
        DV=second.dims,
        EXACT=exact,
        STAGES=3,
    )
    finish_sup_con[(B,)](
        z, sums, losses, grad, B, second.parts, 1 / pairs.temperature, D=D, DP=DP, BS=_at_a_time(second.parts, D)
    )
