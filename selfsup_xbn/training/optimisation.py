"""Learning rate as a function of the position in a run, without state."""

from __future__ import annotations

import math

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
