"""Sums of gradients over several processes, computed by torch's DistributedDataParallel during the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from selfsup_xbn.utils.distributed import peers, world


class GradientSum:
    """Backward passes that leave in each parameter the sum of its gradients over all processes.

    With one process it computes plain backward passes. The buckets of DistributedDataParallel are in the order of the
    parameters and are never rebuilt (``find_unused_parameters=True``), so that a resumed run adds gradients in the
    same order as an uninterrupted one.

    Args:
        module: Module that contains the parameters.
        parameters: Parameters to train. All others are left out.
        compression: ``"none"``, or the hook that compresses the gradients on their way: ``"bf16"`` or ``"powersgd"``.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> loss = GradientSum(layer, layer.parameters()).backward(lambda: layer(torch.ones(3, 2)).sum())
        >>> layer.weight.grad
        tensor([[3., 3.]])
    """

    def __init__(self, module: nn.Module, parameters: Iterable[nn.Parameter], compression: str = "none") -> None:
        self.replica: DistributedDataParallel | None = None
        if world() == 1:
            return
        step, trained = _Step(module), {id(parameter) for parameter in parameters}
        left_out = [name for name, parameter in step.named_parameters() if id(parameter) not in trained]
        left_out += [name for name, _ in step.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, left_out)
        self.replica = DistributedDataParallel(
            step,
            gradient_as_bucket_view=True,
            init_sync=False,  # equal seeds or a broadcast checkpoint make the replicas equal
            find_unused_parameters=True,
        )
        state = PowerSGDState(process_group=None) if compression == "powersgd" else None
        self.replica.register_comm_hook(state, HOOKS[compression])

    def backward(self, loss: Callable[[], Tensor], *, last: bool = True) -> Tensor:
        """Compute a loss and its backward pass, and return the loss.

        Args:
            loss: Function that computes the loss.
            last: Whether the gradients of this pass and of those before it are complete and can be summed over the
                processes.

        Raises:
            ProcessLost: Another process ended or timed out.
        """
        if self.replica is None:
            value = loss()
            value.backward()
            return value
        with contextlib.nullcontext() if last else self.replica.no_sync():
            value = self.replica(loss)
        with peers(computes=True):
            value.backward()
        return value


class _Step(nn.Module):
    """The module that is replicated. It calls the function that it is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        """Return the result of a function that uses the module."""
        return function()


def _sum(bucket: dist.GradBucket) -> Any:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def _bf16_mean(bucket: dist.GradBucket) -> Any:
    assert dist.group.WORLD is not None
    return bf16_compress_hook(dist.group.WORLD, bucket)


def _times_world(mean: Any) -> Any:
    """Turn the mean that a hook of torch computes, a future, into a sum."""
    return mean.then(lambda future: future.value().mul_(world()))


# Torch refuses annotations other than its own, which lambdas do not have.
HOOKS: dict[str, Callable[[Any, dist.GradBucket], Any]] = {
    "none": lambda _, bucket: _sum(bucket),
    "bf16": lambda _, bucket: _times_world(_bf16_mean(bucket)),
    "powersgd": lambda state, bucket: _times_world(powerSGD_hook(state, bucket)),
}
