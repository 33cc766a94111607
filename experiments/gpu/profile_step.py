"""Print the kernels of one training step of Fig. 2 on a CUDA device, and their time.

python -m experiments.gpu.profile_step
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.benchmarks.pretraining import random_images
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.training.run import Run

STEPS = 20


def show(**changes: Any) -> None:
    """Print the times of a step with these options, and its most expensive kernels."""
    with mock.patch("selfsup_xbn.training.run.data_of", random_images):
        run = Run(replace(RECIPES["cifar10-fig2"], device="cuda", drift_every=0, **changes))
    batches = iter(run.batches.epoch(0))
    for _ in range(10):
        run.train_step(next(batches))
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        run.train_step(next(batches))
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    step = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            run.train_step(next(batches))
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time for event in kernels) / 5e3
    print(changes, f"host {1e3 * host / STEPS:.2f} ms, step {1e3 * step / STEPS:.2f} ms, GPU busy {busy:.2f} ms")
    for event in sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)[:16]:
        print(f"    {event.device_time_total / 5e3:7.3f} ms {event.count / 5:5.0f} x  {event.key[:100]}")


if __name__ == "__main__":
    show(batch_size=128)
    show(batch_size=128, compile=True)
