"""Means over an epoch, kept on the device until they are asked for."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class MetricAccumulator:
    """Sums, counts and maxima of named values over an epoch, and the seconds that its training took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.maxima: dict[str, Tensor] = {}
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Start the clock: the caller begins, or goes on, to train."""
        self._since = time.perf_counter()

    def add(self, name: str, value: Tensor) -> None:
        """Count a value towards the mean of that name."""
        self.sums[name] = self.sums.get(name, 0) + value.detach().double()
        self.counts[name] = self.counts.get(name, 0) + 1

    def add_maximum(self, name: str, value: Tensor) -> None:
        """Keep the largest value of that name."""
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def mean(self, name: str) -> float:
        """Return the mean of the values so far; waits for the device."""
        return (self.sums[name] / self.counts[name]).item()

    def record(self, batch_size: int) -> dict[str, float]:
        """Return all means and maxima, and images a second of training; waits for the device."""
        values = {name: self.mean(name) for name in self.sums} | {name: m.item() for name, m in self.maxima.items()}
        if seconds := self._elapsed():
            values["images_per_second"] = self.counts["loss"] * batch_size / seconds
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint in the middle of an epoch needs."""
        return {"sums": self.sums, "counts": self.counts, "maxima": self.maxima, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums of a checkpoint."""
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.maxima = {name: value.to(self.device) for name, value in state["maxima"].items()}
        self.counts, self.seconds = dict(state["counts"]), state["seconds"]

    def _elapsed(self) -> float:
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)
