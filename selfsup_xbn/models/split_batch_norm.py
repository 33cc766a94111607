"""BatchNorm over splits of a batch, as several GPUs with separate BatchNorm statistics compute it.

In MoCo, the statistics of a shared batch reveal which key belongs to a query. Separate statistics of small splits, with
shuffled keys, remove this information (He et al., arXiv 1911.05722, Sec. 3.3).

Axis legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_xbn.memory.device import uses_kernels


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that normalizes each of ``splits`` consecutive splits of the batch by its own statistics.

    The sizes of the splits differ by at most one, and a split has at least two samples. A batch of fewer than
    ``2 * splits`` samples is divided into fewer splits. The running statistics are updated with the mean of the
    statistics over the splits. In eval mode the module equals BatchNorm2d.

    Args:
        num_features: number of channels C.
        splits: number of splits. With 1 the module equals BatchNorm2d.
        eps: added to the variance, as in BatchNorm2d.
        momentum: momentum of the running statistics, as in BatchNorm2d. None is not supported.
        affine: whether the module has a learnable weight and bias, as in BatchNorm2d.

    Attributes:
        implementation: ``"torch"``, ``"triton"``, or ``"auto"`` for Triton kernels on a GPU, except in compiled code.
            The kernels serve the training mode. They have no second derivative.

    Raises:
        ValueError: ``splits`` is below 1.

    Example:
        >>> SplitBatchNorm2d(16, splits=4)(torch.randn(8, 16, 5, 5)).shape
        torch.Size([8, 16, 5, 5])
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
            raise ValueError(f"expected splits of at least 1, got {splits}")
        self.splits = splits
        self.implementation = "auto"

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalize each channel of each split. The output has the memory format of the input."""
        # A graph traced in eval mode must not depend on the batch size.
        count = min(self.splits, len(input) // 2) if self.training else 1
        if count <= 1:
            return super().forward(input)
        if (output := self._fused(input, count)) is not None:
            return output
        means, variances = self.running_mean.repeat(count), self.running_var.repeat(count)
        if len(input) % count == 0:
            output = self._normalize_equal_splits(input, count, means, variances)
        else:
            sizes = _split_sizes(len(input), count)
            statistics = zip(input.split(sizes), means.chunk(count), variances.chunk(count), strict=True)
            output = torch.cat([self._normalize(*split, self.weight, self.bias) for split in statistics])
        self._update_running(means.view(count, -1).mean(0), variances.view(count, -1).mean(0))
        return output

    def _fused(self, input: Tensor, count: int) -> Tensor | None:
        """Return the output of the Triton kernels, or None where they are not to be used or do not take the input."""
        if not uses_kernels(self.implementation, input.device):
            return None
        from selfsup_xbn.models import kernels

        if not kernels.supports(input):
            return None
        statistics = self.running_mean, self.running_var, self.num_batches_tracked
        return kernels.split_batch_norm(input, self.weight, self.bias, *statistics, count, self.momentum, self.eps)

    def _normalize_equal_splits(self, input: Tensor, count: int, means: Tensor, variances: Tensor) -> Tensor:
        """Normalize ``count`` splits of equal size with one BatchNorm over the channels of all splits."""
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
    def _update_running(self, mean: Float[Tensor, "C"], variance: Float[Tensor, "C"]) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        self.num_batches_tracked.add_(1)

    def extra_repr(self) -> str:
        """Return the arguments of the module for ``print(module)``."""
        return f"{super().extra_repr()}, splits={self.splits}"


def _split_sizes(size: int, count: int) -> list[int]:
    """Return ``count`` integers that sum to ``size`` and differ by at most one, in descending order."""
    return [(size + i) // count for i in reversed(range(count))]


def split_batch_norms(model: nn.Module, splits: int) -> nn.Module:
    """Replace each BatchNorm2d inside ``model`` by a SplitBatchNorm2d with the same parameters and statistics.

    Subclasses of BatchNorm2d, such as the fused BatchNorm and activation of timm, are not replaced.

    Args:
        model: module that is changed in place. The module itself is not replaced.
        splits: number of splits of each SplitBatchNorm2d.

    Returns:
        The same module.
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
