"""A training step as one CUDA graph: the host launches one graph in place of some thousand kernels.

A graph repeats the recorded kernels on the recorded addresses. So the views live in tensors of this module, which each
step fills, and the learning rate is a tensor that the trainer writes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # eager steps before the capture: libraries choose kernels, the optimiser makes its state


class GraphedStep:
    """A step that runs eagerly ``WARM_UP`` times, is captured, and is replayed from then on.

    Every call trains: the warm-up steps are steps of the run, and the capture itself executes nothing.

    Args:
        step: forward, backward and optimiser step of (views, labels); returns the loss. It must not wait for the
            device, and it must read and write tensors that stay where they are.

    Attributes:
        replays: replays of the graph; the owner may set it to 0.

    Raises:
        RuntimeError: at the call that captures, if the step does something that a graph cannot hold.
    """

    def __init__(self, step: Callable[[tuple[Tensor, ...], Tensor], Tensor]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.calls = self.replays = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Run one step and return its loss. Batches must have the shapes of the first call."""
        if self.graph is None and self.calls < WARM_UP:
            self.calls += 1
            return self._eager(views, labels)
        if self.graph is None:
            self._capture(views, labels)
        assert self.graph is not None
        for own, given in zip((*self.views, self.labels), (*views, labels), strict=True):
            own.copy_(given)
        self.graph.replay()
        self.replays += 1
        return self.loss.clone()

    def _eager(self, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Run the step on the stream of the capture, as torch asks for before a capture."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.step(views, labels)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _capture(self, views: tuple[Tensor, ...], labels: Tensor) -> None:
        self.views, self.labels = tuple(view.clone() for view in views), labels.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.loss = self.step(self.views, self.labels)
        self.graph = graph
