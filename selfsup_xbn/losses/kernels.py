"""InfoNCE and SupCon of a batch against a queue as Triton kernels: two or three launches, whatever M is.

The first kernel is flash attention (arXiv 2205.14135) with the rows of the queue as keys and as values, split over the
queue as in flash decoding: a program takes a block of anchors and a part of the queue. It decodes a tile of rows by the
queue's affine map, divides them by their length, multiplies, and adds up exponentials and rows relative to the largest
logit so far. The second kernel combines the parts of each anchor, and computes its loss and gradient. SupCon runs a
third kernel, which averages the losses.

The tensor cores multiply unit vectors in float16, which has 11 significant bits, as TF32 has. If
``torch.get_float32_matmul_precision()`` is "highest" (torch's default), the products of the rounding errors are added
(``EXACT``, 22 bits): the results are those of float32, and the first kernel takes twice as long. "high" and "medium"
leave them out.

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

from selfsup_xbn.losses._triton import average, finish_info_nce, finish_sup_con, scan
from selfsup_xbn.losses.blockwise import refuse_second_derivative
from selfsup_xbn.losses.pairs import Pairs
from selfsup_xbn.memory.feature_queue import FeatureQueue

LOG2E = math.log2(math.e)
MAX_DIM = 512  # unit anchors are kept in shared memory
MIN_TEMPERATURE = 1e-4  # unit anchors over the temperature are kept in float16


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
        programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        parts = max(1, min(triton.cdiv(M, rows), programs // (triton.cdiv(B, anchors) * DP // values)))
        stages = (1 if DP > 256 else 2) if exact else (2 if DP > 256 else 3)
        return Tiles(anchors, rows, values, parts, 8 if anchors >= 64 else 4, stages)


class _Sums(NamedTuple):
    """Sums of the first kernel over each part of the queue."""

    peaks: Float[Tensor, "SB"]
    totals: Float[Tensor, "SB"]
    weighted: Float[Tensor, "SBD"]
    positive_rows: Float[Tensor, "SBD"]
    positives: Int32[Tensor, "SB"]
    negatives: Int32[Tensor, "SB"]
    parts: int

    def sizes(self, dim: int) -> dict[str, int]:
        """Return the sizes that the second kernel is compiled for."""
        SP, DP = triton.next_power_of_2(self.parts), _padded(dim)
        return {"D": dim, "DP": DP, "SP": SP, "BS": min(SP, max(1, 2**13 // DP))}


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


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
        (B, D), sums = q.shape, _launch(q, pairs)
        losses, grad_q, grad_k = (q.new_empty(shape, dtype=torch.float32) for shape in ((B,), (B, D), (B, D)))
        finish_info_nce[(B,)](
            q, k, *sums[:3], losses, grad_q, grad_k, B, sums.parts, 1 / pairs.temperature, **sums.sizes(D)
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
        z = embeddings.contiguous()
        (B, D), sums = z.shape, _launch(z, pairs)
        losses, weights, grad, loss = (z.new_empty(n, dtype=torch.float32) for n in ((B,), (B, 1), (B, D), ()))
        counts = torch.empty((2, B), dtype=torch.int32, device=z.device)
        pair_counts = torch.empty(2, dtype=torch.int64, device=z.device)
        finish_sup_con[(B,)](z, *sums[:-1], losses, grad, counts, B, sums.parts, 1 / pairs.temperature, **sums.sizes(D))
        average[(1,)](losses, counts, loss, weights, pair_counts, B, BP=triton.next_power_of_2(B))
        ctx.save_for_backward(grad, weights)
        ctx.dtype = z.dtype
        ctx.mark_non_differentiable(pair_counts)
        return loss, pair_counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        grad, weights = ctx.saved_tensors
        return (grad * (weights * grads[0])).to(ctx.dtype), None


def _launch(anchors: Float[Tensor, "B D"], pairs: Pairs) -> _Sums:
    """Run the first kernel."""
    queue = pairs.queue
    assert queue is not None
    B, D = anchors.shape
    exact = torch.get_float32_matmul_precision() == "highest"
    tiles = Tiles.of(B, queue.size, _padded(D), anchors.device, exact)
    part = triton.cdiv(triton.cdiv(queue.size, tiles.parts), tiles.rows) * tiles.rows
    S = triton.cdiv(queue.size, part)
    classes = pairs.labels is not None
    own = None if pairs.self_indices is None else pairs.self_indices.contiguous()
    E = 0 if own is None else own.numel() // B
    sizes = [S * B * D, S * B * D * classes, S * B, S * B]
    weighted, positive_rows, peaks, totals = anchors.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    positives, negatives = torch.empty((2, S * B * classes), dtype=torch.int32, device=anchors.device)
    sums = _Sums(peaks, totals, weighted, positive_rows, positives, negatives, S)
    factor = LOG2E / pairs.temperature
    scan[triton.cdiv(B, tiles.anchors), S, _padded(D) // tiles.values](
        anchors,
        queue.rows,
        queue.scale,
        queue.shift,
        queue.written,
        pairs.labels if classes else queue.written,
        queue.labels if classes else queue.written,
        queue.written if own is None else own,
        *sums[:-1],
        B,
        queue.size,
        part,
        factor,
        max(min(pairs.below * LOG2E, 1e29), -1e29),
        max(min(pairs.above * LOG2E, 1e29), -1e29),
        D=D,
        DP=_padded(D),
        E=E,
        BB=tiles.anchors,
        BM=tiles.rows,
        DV=tiles.values,
        DC=min(tiles.values, 64),
        CLASSES=classes,
        EXACT=exact,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return sums
