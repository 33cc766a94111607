"""Means and maxima over an epoch, accumulated on the device."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from selfsup_xbn.evaluation.drift import moment_gap
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.moments import AdaptRecord


class MetricAccumulator:
    """Accumulator of named values over an epoch, and of the training time in seconds.

    Args:
        device: Device of the values.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.maxima: dict[str, Tensor] = {}
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Start the clock, at the start of the training or after it was resumed."""
        self._since = time.perf_counter()

    def add(self, name: str, value: Tensor) -> None:
        """Add a value to the mean of a name. Does not synchronize the host with the device."""
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(value, dtype=torch.float64)
        self.sums[name].add_(value.detach())
        self.counts[name] = self.counts.get(name, 0) + 1

    def add_maximum(self, name: str, value: Tensor) -> None:
        """Update the maximum of a name. Does not synchronize the host with the device."""
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def mean(self, name: str) -> float:
        """Return the mean of the values of a name. Synchronizes the host with the device."""
        return (self.sums[name] / self.counts[name]).item()

    def record(self, batch_size: int) -> dict[str, float]:
        """Return all means and maxima, and the training speed in images per second.

        Synchronizes the host with the device.

        Args:
            batch_size: Number of images per step.
        """
        values = {name: self.mean(name) for name in self.sums} | {name: m.item() for name, m in self.maxima.items()}
        if seconds := self._elapsed():
            values["images_per_second"] = self.counts["loss"] * batch_size / seconds
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for a checkpoint within an epoch."""
        return {"sums": self.sums, "counts": self.counts, "maxima": self.maxima, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.maxima = {name: value.to(self.device) for name, value in state["maxima"].items()}
        self.counts, self.seconds = dict(state["counts"]), state["seconds"]

    def _elapsed(self) -> float:
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


def add_gaps(meter: MetricAccumulator, record: AdaptRecord | None) -> None:
    """Add the gaps between the moments of queue and batch, before and after an adaptation, to their means."""
    if record is None:
        return
    for when, moments in (("before", record.before), ("after", record.after)):
        gap = moment_gap(moments, record.batch)
        meter.add(f"gap_mean_{when}", gap.mean)
        meter.add(f"gap_std_{when}", gap.std)


def queue_record(queue: FeatureQueue | None) -> dict[str, int | float]:
    """Return the number of skipped batches and, with AXBN, the Kalman gain. Synchronizes the host with the device."""
    if queue is None:
        return {}
    gain = getattr(queue.adaptation, "gain", None)
    return {"skipped_batches": int(queue.skipped)} | ({} if gain is None else {"gain": gain.item()})
