"""Means over an epoch, kept on the device until they are asked for."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Sums, counts and maxima of named values over an epoch, and the seconds that it took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.maxima: dict[str, Tensor] = {}
        self.seconds = 0.0
        self._since = time.perf_counter()

    def add(self, name: str, value: Tensor) -> None:
        """Counts a value towards the mean of that name."""
        self.sums[name] = self.sums.get(name, 0) + value.detach().double()
        self.counts[name] = self.counts.get(name, 0) + 1

    def add_maximum(self, name: str, value: Tensor) -> None:
        """Keeps the largest value of that name."""
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def mean(self, name: str) -> float:
        """Mean of the values as yet; waits for the device."""
        return (self.sums[name] / self.counts[name]).item()

    def record(self, batch_size: int) -> dict[str, float]:
        """All means and maxima, and images a second, end to end; waits for the device."""
        found = {name: self.mean(name) for name in self.sums} | {name: m.item() for name, m in self.maxima.items()}
        return found | {"images_per_second": self.counts["loss"] * batch_size / self._elapsed()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of an epoch needs."""
        return {"sums": self.sums, "counts": self.counts, "maxima": self.maxima, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.maxima = {name: value.to(self.device) for name, value in state["maxima"].items()}
        self.counts, self.seconds = dict(state["counts"]), state["seconds"]

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._since
