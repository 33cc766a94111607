"""InfoNCE and SupCon of a batch against a queue as Triton kernels.

InfoNCE takes two launches, whatever M is. The first kernel is flash attention (arXiv 2205.14135) with the rows of the
queue as keys and as values, split over the queue as in flash decoding: a program takes a block of anchors and a part of
the queue. It decodes a tile of rows by the queue's affine map, divides them by their length, multiplies, and adds up
exponentials and rows relative to the largest logit so far. The second kernel combines the parts of each query, and
computes its loss and gradient. SupCon has a module beside this one, ``sup_con_kernels``.

The tensor cores multiply in float16 or TF32, which have 11 significant bits. If
``torch.get_float32_matmul_precision()`` is "highest" (torch's default), the products of the rounding errors are added
(``EXACT``, 22 bits), and sums are kept in float32: the results are those of float32, and the products take up to three
times as long. "high" and "medium" leave them out.

Axis legend: B anchors, M queue rows, D dimensions, E own rows of an anchor, S parts of the queue. Sizes with a P are
padded to a power of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float
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
from selfsup_xbn.losses._triton import finish_info_nce, scan
from selfsup_xbn.losses.blockwise import refuse_second_derivative
from selfsup_xbn.losses.pairs import Pairs
from selfsup_xbn.losses.sup_con_kernels import sup_con as sup_con
from selfsup_xbn.memory.feature_queue import FeatureQueue

MAX_DIM = 512  # InfoNCE keeps unit queries in shared memory
MIN_TEMPERATURE = 1e-4  # InfoNCE keeps unit queries over the temperature in float16


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
        parts = max(1, min(triton.cdiv(M, rows), processors(device) // (triton.cdiv(B, anchors) * DP // values)))
        stages = (1 if DP > 256 else 2) if exact else (2 if DP > 256 else 3)
        return Tiles(anchors, rows, values, parts, 8 if anchors >= 64 else 4, stages)


class _Sums(NamedTuple):
    """Sums of the first kernel over each part of the queue."""

    peaks: Float[Tensor, "SB"]
    totals: Float[Tensor, "SB"]
    weighted: Float[Tensor, "SBD"]
    parts: int


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, pairs: Pairs) -> Tensor:
        q, k = q.contiguous(), k.contiguous()
        (B, D), sums = q.shape, _scan(q, pairs)
        losses, grad_q, grad_k = (empty(q, *shape) for shape in ((B,), (B, D), (B, D)))
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
            DP=padded(D),
            SP=triton.next_power_of_2(sums.parts),
            BS=parts_at_a_time(sums.parts, D),
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


def _scan(anchors: Float[Tensor, "B D"], pairs: Pairs) -> _Sums:
    """Run the first kernel of InfoNCE."""
    queue, own = queue_of(pairs), own_rows(pairs)
    B, D = anchors.shape
    exact = is_exact()
    tiles = Tiles.of(B, queue.size, padded(D), anchors.device, exact)
    S, part = split(queue.size, tiles.rows, tiles.parts)
    sizes = [S * B * D, S * B, S * B]
    weighted, peaks, totals = empty(anchors, sum(sizes)).split(sizes)
    scan[triton.cdiv(B, tiles.anchors), S, padded(D) // tiles.values](
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
        DP=padded(D),
        E=rows_per_anchor(own, B),
        BB=tiles.anchors,
        BM=tiles.rows,
        DV=tiles.values,
        EXACT=exact,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return _Sums(peaks, totals, weighted, S)
