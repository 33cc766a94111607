"""BatchNorm over splits of a batch as Triton kernels: two launches forward, two backward.

A program takes some channels of a part of a split. The first kernel of a pass adds up its rows, and the second one adds
up the parts of the split and computes the rows of the result. The tensors keep their memory format and are not copied.
The arithmetic is that of float32.

Axis legend: B batch, C channels, H height, W width, S splits, P parts of a split. A row is a pixel of an image.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.models._triton import gradient_sums, input_gradient, normalize, statistics

MAX_CHANNELS = 32  # of a program
MAX_PARTS = 32  # of a split
TILE = 4096  # numbers that a program reads at a time


class _Grid(NamedTuple):
    """Programs of a kernel, and its sizes."""

    programs: tuple[int, int, int]
    sizes: tuple[int, ...]  # B, HW, C, S, P, rows of a part
    tiles: dict[str, Any]
    merge: dict[str, Any]  # the tiles of the second kernel of a pass

    def new_parts(self, device: torch.device) -> Float[Tensor, "2 P S C"]:
        """Return memory for two sums of each channel of each part."""
        _, _, C, S, P, _ = self.sizes
        return torch.empty((2, P, S, C), dtype=torch.float32, device=device)


@functools.cache
def _grid(shape: torch.Size, splits: int, channels_last: bool, device: torch.device) -> _Grid:
    """Return programs that fill the device about four times."""
    B, C, H, W = shape
    BC = min(MAX_CHANNELS, triton.next_power_of_2(C))
    BR, rows = TILE // BC, triton.cdiv(B, splits) * H * W
    groups = triton.cdiv(C, BC) * splits
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
    parts = max(1, min(4 * processors // groups, triton.cdiv(rows, BR), MAX_PARTS))
    part = triton.cdiv(triton.cdiv(rows, parts), BR) * BR
    P = triton.cdiv(rows, part)
    tiles = {"CHANNELS_LAST": channels_last, "BR": BR, "BC": BC, "num_warps": 8}
    merge = {**tiles, "PP": triton.next_power_of_2(P)}
    return _Grid((triton.cdiv(C, BC), splits, P), (B, H * W, C, splits, P, part), tiles, merge)


def supports(input: Tensor) -> bool:
    """Return whether the kernels take this input: no float64, and no subclass of Tensor."""
    return type(input) is Tensor and input.dtype in (torch.float32, torch.bfloat16, torch.float16) and input.numel() > 0


def split_batch_norm(
    input: Float[Tensor, "B C H W"],
    weight: Float[Tensor, "C"] | None,
    bias: Float[Tensor, "C"] | None,
    running_mean: Float[Tensor, "C"],
    running_var: Float[Tensor, "C"],
    tracked: Int64[Tensor, ""],
    splits: int,
    momentum: float,
    eps: float,
) -> Float[Tensor, "B C H W"]:
    """Do what ``SplitBatchNorm2d`` does in training mode, with ``splits`` of at most B / 2."""
    output: Tensor = _SplitBatchNorm.apply(
        input, weight, bias, (running_mean, running_var, tracked), splits, momentum, eps
    )
    return output


class _SplitBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor, Tensor],
        splits: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = _dense(x)
        grid, affine = _grid(x.shape, splits, not x.is_contiguous(), x.device), weight is not None
        parts, y = grid.new_parts(x.device), torch.empty_like(x)
        saved = torch.empty((2, splits, x.shape[1]), dtype=torch.float32, device=x.device)
        statistics[grid.programs](x, parts, *grid.sizes, **grid.tiles)
        normalize[grid.programs](
            x,
            parts,
            weight if affine else saved,
            bias if affine else saved,
            y,
            saved,
            *running,
            *grid.sizes,
            momentum,
            eps,
            AFFINE=affine,
            **grid.merge,
        )
        ctx.save_for_backward(x, saved, weight)
        ctx.grid = grid
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, saved, weight = ctx.saved_tensors
        grid, affine = ctx.grid, weight is not None
        last = grid.tiles["CHANNELS_LAST"]
        gradient = grads[0].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        parts, grad_x = grid.new_parts(x.device), torch.empty_like(x)
        grad_weight, grad_bias = (torch.empty_like(weight) if affine else None for _ in "wb")
        gradient_sums[grid.programs](x, gradient, saved, parts, *grid.sizes, **grid.tiles)
        input_gradient[grid.programs](
            x,
            gradient,
            saved,
            parts,
            weight if affine else saved,
            grad_x,
            grad_weight if affine else saved,
            grad_bias if affine else saved,
            *grid.sizes,
            AFFINE=affine,
            **grid.merge,
        )
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _dense(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Return the input in one of the two memory formats, without a copy if it has one of them."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
