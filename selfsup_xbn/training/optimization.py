"""Optimizer, and the learning rate as a function of the position in a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from selfsup_xbn.config.schema import Config


def learning_rate(config: Config, epoch: int, fraction: float) -> float:
    """Return the learning rate of a step.

    The learning rate increases with every step during the warm-up and is constant within an epoch afterwards.

    Args:
        config: Configuration of the run.
        epoch: Index of the epoch, from 0.
        fraction: Completed fraction of the epoch, in [0, 1).
    """
    if epoch + fraction < config.warmup_epochs:
        return config.lr * (epoch + fraction) / config.warmup_epochs
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    if config.schedule == "step":
        return config.lr * config.step_factor ** (epoch // config.step_epochs)
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters, in place if it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_optimizer(config: Config, module: nn.Module) -> torch.optim.Optimizer:
    """Return the SGD or AdamW optimizer of the parameters that require gradients.

    On CUDA the optimizer is fused, and the learning rate is a tensor, so that a CUDA graph can capture the step.

    Args:
        config: Configuration of the run.
        module: Module to train.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    cuda = parameters[0].is_cuda
    lr = torch.tensor(config.lr, device=parameters[0].device) if cuda else config.lr
    options: dict[str, Any] = {"lr": lr, "weight_decay": config.weight_decay, "fused": cuda or None}
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, capturable=cuda, **options)
        optimizer._warned_capturable_if_run_uncaptured = True  # some steps are eager
        return optimizer
    return torch.optim.SGD(parameters, momentum=config.sgd_momentum, **options)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore the state of an optimizer that may have run on another device, and keep the options of this one.

    A CUDA graph reads the learning rate from a tensor on its device, but that of a checkpoint is a tensor on the CPU or
    a number.

    Args:
        optimizer: Optimizer with the same parameters.
        state: State dict of the other optimizer.

    Raises:
        ValueError: The other optimizer has other parameters.
    """
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    options = [{**own, "params": saved["params"]} for saved, own in groups]
    optimizer.load_state_dict({**state, "param_groups": options})
