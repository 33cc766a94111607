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
        """Each channel of each part with mean 0 and variance 1, scaled and shifted; same memory format as ``input``."""
        count = min(self.splits, len(input) // 2) if self.training else 1  # no look at the size where a graph is made
        if count <= 1:
            return super().forward(input)
        means, variances = self.running_mean.repeat(count, 1), self.running_var.repeat(count, 1)
        parts = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(input.split(_part_sizes(len(input), count)), means, variances, strict=True)
        ]
        self._keep(means.mean(0), variances.mean(0))
        return torch.cat(parts)

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
