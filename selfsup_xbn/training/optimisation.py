"""The optimizer, and the learning rate as a function of the position in a run, without state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from selfsup_xbn.config.schema import Config


def learning_rate(config: Config, epoch: int, fraction: float) -> float:
    """Learning rate in an epoch counted from 0, ``fraction`` of it done.

    It changes from epoch to epoch (cosine to 0 over the run, or a step every ``step_epochs``), and from step to
    step while it warms up.
    """
    if epoch + fraction < config.warmup_epochs:
        return config.lr * (epoch + fraction) / config.warmup_epochs
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    if config.schedule == "step":
        return config.lr * config.step_factor ** (epoch // config.step_epochs)
    return config.lr


def make_optimizer(config: Config, module: nn.Module) -> torch.optim.Optimizer:
    """Return SGD or AdamW over the parameters that are trained.

    On CUDA one kernel updates all parameters, and the learning rate is a tensor, which a CUDA graph can follow.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    cuda = parameters[0].is_cuda
    lr = torch.tensor(config.lr, device=parameters[0].device) if cuda else config.lr
    options: dict[str, Any] = {"lr": lr, "weight_decay": config.weight_decay, "fused": cuda or None}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.SGD(parameters, momentum=config.sgd_momentum, **options)
