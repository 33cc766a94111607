"""Training step that is captured as a CUDA graph, which replaces some hundred kernel launches by one launch.

A graph replays the captured kernels on the captured addresses. Each call therefore copies the batch to static tensors,
and the learning rate and a scheduled momentum are tensors that the trainer updates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # eager steps before the capture, in which libraries select kernels and the optimizer creates its state


class CaptureError(RuntimeError):
    """The step has an operation that a CUDA graph does not support. The capture executed no kernels."""


class GraphedStep:
    """A step that runs eagerly ``WARM_UP`` times and is then captured and replayed.

    Each call is a step of the training. The capture itself executes no kernels and is followed by a replay.

    Args:
        step: Function of (views, labels) that performs the forward pass, the backward pass and the optimizer step, and
            returns the loss. It must not synchronize the host with the device, and the addresses of the tensors that
            it reads and writes must not change.

    Attributes:
        replays: Number of replays of the graph. The caller may reset it to 0.

    Raises:
        CaptureError: The call that captures the step encounters an operation that a graph does not support.
    """

    def __init__(self, step: Callable[[tuple[Tensor, ...], Tensor], Tensor]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.calls = self.replays = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Perform one step and return its loss. The shapes of all batches must be equal."""
        if self.graph is None and self.calls < WARM_UP:
            self.calls += 1
            return self._eager(views, labels)
        if self.graph is None:
            self._capture(views, labels)
        assert self.graph is not None
        for static, value in zip((*self.views, self.labels), (*views, labels), strict=True):
            static.copy_(value)
        self.graph.replay()
        self.replays += 1
        return self.loss.clone()

    def _eager(self, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Run the step on the stream of the capture, which torch requires for the warm-up."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.step(views, labels)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _capture(self, views: tuple[Tensor, ...], labels: Tensor) -> None:
        self.views, self.labels = tuple(view.clone() for view in views), labels.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as the one that pins the next batch, may call CUDA during the capture.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.loss = self.step(self.views, self.labels)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(str(error).splitlines()[0]) from error
        self.graph = graph
