"""BatchNorm over parts of a batch: what several GPUs with a plain BatchNorm each would compute, on one device.

In MoCo, BatchNorm lets a query and its key recognise each other by the statistics of their common batch. Small parts,
with the keys shuffled, take that short cut away (He et al., arXiv 1911.05722, section 3.3).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of ``splits`` consecutive parts of the batch, each on its own.

    The parts' sizes differ by one at most. A part has at least two samples: a batch with fewer than ``2 * splits``
    is cut into fewer parts, one of 2 or 3 into one. Each part takes one step of the running statistics from where they
    stood, and the mean over the parts is kept. In eval mode this is BatchNorm2d.

    Args:
        num_features: channels C.
        splits: parts that the batch is cut into; 1 is BatchNorm2d.
        eps, momentum, affine: as in BatchNorm2d; the momentum must be a number.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(
        self, num_features: int, splits: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        if splits < 1:
            raise ValueError(f"expected at least one split, got {splits}")
        self.splits = splits

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalise each channel of each part; the output has the memory format of ``input``."""
        count = min(self.splits, len(input) // 2) if self.training else 1  # no look at the size where a graph is made
        if count <= 1:
            return super().forward(input)
        means, variances = self.running_mean.repeat(count), self.running_var.repeat(count)
        if len(input) % count == 0:
            output = self._equal_parts(input, count, means, variances)
        else:
            sizes = _part_sizes(len(input), count)
            statistics = zip(input.split(sizes), means.chunk(count), variances.chunk(count), strict=True)
            output = torch.cat([self._normalize(*part, self.weight, self.bias) for part in statistics])
        self._keep(means.view(count, -1).mean(0), variances.view(count, -1).mean(0))
        return output

    def _equal_parts(self, input: Tensor, count: int, means: Tensor, variances: Tensor) -> Tensor:
        """Normalise ``count`` parts of one size by a single BatchNorm whose channels are the channels of all parts."""
        weight, bias = (None if p is None else p.repeat(count) for p in (self.weight, self.bias))
        if input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous():
            images = input.permute(0, 2, 3, 1).unflatten(0, (count, -1))  # [count, B / count, H, W, C], a view
            images = images.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)
            output = self._normalize(images, means, variances, weight, bias)
            output = output.permute(0, 2, 3, 1).unflatten(3, (count, -1))
            return output.permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)
        images = input.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
        output = self._normalize(images, means, variances, weight, bias)
        return output.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)

    def _normalize(
        self, input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        return F.batch_norm(input, mean, variance, weight, bias, True, self.momentum, self.eps)

    @torch.no_grad()
    def _keep(self, mean: Float[Tensor, "C"], variance: Float[Tensor, "C"]) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        self.num_batches_tracked.add_(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}"


def _part_sizes(size: int, count: int) -> list[int]:
    """``size`` as a sum of ``count`` integers that differ by one at most, the larger ones first."""
    return [(size + i) // count for i in reversed(range(count))]


def split_batch_norms(model: nn.Module, splits: int) -> nn.Module:
    """Replace each BatchNorm2d inside ``model`` by a SplitBatchNorm2d with the same parameters and statistics.

    Layers derived from BatchNorm2d (timm's fused BatchNorm + activation) are left alone.
    """
    for name, module in model.named_children():
        if type(module) is nn.BatchNorm2d:
            setattr(model, name, _split(module, splits))
        else:
            split_batch_norms(module, splits)
    return model


def _split(norm: nn.BatchNorm2d, splits: int) -> SplitBatchNorm2d:
    assert norm.momentum is not None
    split = SplitBatchNorm2d(norm.num_features, splits, norm.eps, norm.momentum, norm.affine)
    split.load_state_dict(norm.state_dict())
    return split
