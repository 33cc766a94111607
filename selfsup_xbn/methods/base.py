"""Base class of the training methods, and the construction of their queues from a config.

Axis legend: B batch, b shard of the batch on this rank, C channels, S side of an image, D dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from selfsup_xbn.config.registry import ADAPTATIONS, imported
from selfsup_xbn.config.schema import Config, queue_rows
from selfsup_xbn.memory.adaptation import AXBN, Adaptation
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.sharding import ShardedQueue
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.utils.distributed import world

MicroBatch = tuple[tuple[Tensor, ...], Tensor]
"""Views of this rank's shard of a part of a batch, and the labels of the whole part."""


class Method(nn.Module):
    """Base class: a module whose ``forward`` returns the loss of a training step and updates the queue.

    The trainer optimizes the parameters that require a gradient, evaluates ``encoder`` and saves ``state_dict()``.

    Attributes:
        encoder: the encoder that is evaluated and exported.
        queue: the queue of past embeddings, or None.
        encoder_name: name of the encoder in the state dict.
        queue_takes_whole_batch: whether the queue is adapted to and takes the whole batch at once where a step consists
            of micro-batches.
    """

    encoder: Encoder
    queue: FeatureQueue | None
    encoder_name: ClassVar[str] = "encoder"
    queue_takes_whole_batch: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_config(cls, config: Config, encoder: Encoder, images: int) -> Method:
        """Return the method with the settings of a config.

        Args:
            config: settings of the run.
            encoder: encoder to train.
            images: number of training images, of which the queue size may be a percentage.
        """

    @abstractmethod
    def forward(
        self, views: tuple[Float[Tensor, "b C S S"], ...], labels: Int64[Tensor, "B"], step: int = 0, steps: int = 1
    ) -> Float[Tensor, ""]:
        """Return the loss of a step.

        Args:
            views: ``Config.views`` random views of each image of this rank's shard of the batch.
            labels: class of each image of the whole batch.
            step: number of steps before this one.
            steps: number of steps of the run.
        """

    def losses(self, parts: list[MicroBatch], step: int, steps: int) -> Iterator[Float[Tensor, ""]]:
        """Yield, for each micro-batch of a step, the loss divided by their number, and update the queue.

        The caller computes the backward pass of a loss before it asks for the next one.

        Args:
            parts: micro-batches of equal size.
            step: number of steps before this one.
            steps: number of steps of the run.
        """
        for views, labels in parts:
            yield self(views, labels, step, steps) / len(parts)

    @property
    def capturable(self) -> bool:
        """Whether one CUDA graph can replay every step.

        Of the Python numbers that a step uses, only those that ``update_schedules`` writes to tensors may change.
        """
        return False

    def update_schedules(self, step: int, steps: int) -> None:
        """Write the scheduled values of a step to tensors. The owner of a CUDA graph calls it before each replay.

        Args:
            step: number of steps before this one.
            steps: number of steps of the run.
        """

    def try_loss(self, classes: int) -> None:
        """Compute the loss of a small batch before the training, if the loss was chosen by the user.

        Args:
            classes: number of training classes.

        Raises:
            UserError: the loss cannot be computed.
        """

    def head_loss(self, views: tuple[Float[Tensor, "b C S S"], ...], labels: Int64[Tensor, "B"]) -> Float[Tensor, ""]:
        """Return the loss of a step in the first stage, which trains only the head (``Config.head_epochs``).

        Args:
            views: views of this rank's shard of the batch, as in ``forward``.
            labels: class of each image of the whole batch.

        Raises:
            NotImplementedError: the method has no such stage.
        """
        raise NotImplementedError(
            f"expected head_epochs=0 for {type(self).__name__}, which does not train the head alone"
        )

    def notes(self) -> list[str]:
        """Return what the log of a run should say about the method, one line each."""
        return []


def method_class(config: Config) -> type[Method]:
    """Return the class of the config's method."""
    kind: type[Method] = imported(config.method)
    return kind


def queue_from_config(config: Config, images: int) -> FeatureQueue | None:
    """Return the queue of a config, or None for a queue size of 0.

    Args:
        config: settings of the run.
        images: number of training images, of which the queue size may be a percentage.
    """
    rows, dtype = queue_rows(config, images), getattr(torch, config.queue_dtype)
    if not rows:
        return None
    kind = ShardedQueue if config.shard_queue and world() > 1 else FeatureQueue
    return kind(rows, config.dim, adaptation_from_config(config), labels=config.labelled, dtype=dtype)


def adaptation_from_config(config: Config) -> Adaptation:
    """Return the adaptation of a config. AXBN gets the constants of its Kalman filter from the config."""
    kind: type[Adaptation] = ADAPTATIONS.find(config.adaptation)
    if issubclass(kind, AXBN):
        return kind(config.kalman_q, config.kalman_r, config.kalman_p0, config.gain_interval)
    return kind()
