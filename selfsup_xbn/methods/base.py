"""What a method is to the rest of the package, and what most methods are made of.

Axis legend: B batch, b this process's shard of it, C channels, S side of an image, M queue rows, D dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from selfsup_xbn.config.registry import ADAPTATIONS, imported
from selfsup_xbn.config.schema import Config, queue_rows
from selfsup_xbn.memory.adaptation import AXBN, Adaptation
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.models.encoder import Encoder


class Method(nn.Module):
    """A module whose ``forward`` is the loss of a step, and which moves its queue meanwhile.

    A run trains the parameters that require a gradient, evaluates ``encoder``, and saves ``state_dict()``.

    Attributes:
        encoder: the encoder that is evaluated and exported.
        queue: the memory, or None.
        encoder_name: the encoder's name in the state dict.
    """

    encoder: Encoder
    queue: FeatureQueue | None
    encoder_name: ClassVar[str] = "encoder"

    @classmethod
    @abstractmethod
    def from_config(cls, config: Config, encoder: Encoder, images: int) -> Method:
        """Return the method with the config's settings, for a training set of so many images."""

    @abstractmethod
    def forward(
        self, views: tuple[Float[Tensor, "b C S S"], ...], labels: Int64[Tensor, "B"], step: int = 0, steps: int = 1
    ) -> Float[Tensor, ""]:
        """Return the loss of a step.

        Args:
            views: random views of each image of this process's shard of the batch, ``Config.views`` of them.
            labels: class of each image of the whole batch.
            step, steps: position in the run.
        """

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph of one step repeats every step: no number of the host may change from step to step."""
        return False

    def head_loss(self, views: tuple[Float[Tensor, "b C S S"], ...], labels: Int64[Tensor, "B"]) -> Float[Tensor, ""]:
        """Return the loss of a step in the stage that trains the head alone (``Config.head_epochs``)."""
        raise NotImplementedError(f"{type(self).__name__} has no stage in which the head alone is trained")


def method_class(config: Config) -> type[Method]:
    """Return the class that a run of ``config`` trains."""
    kind: type[Method] = imported(config.method)
    return kind


def queue_from_config(config: Config, images: int) -> FeatureQueue | None:
    """Return the config's queue for a training set of so many images; None for a queue of no rows."""
    rows, dtype = queue_rows(config, images), getattr(torch, config.queue_dtype)
    if not rows:
        return None
    return FeatureQueue(rows, config.dim, adaptation_from_config(config), labels=config.labelled, dtype=dtype)


def adaptation_from_config(config: Config) -> Adaptation:
    """Return the config's adaptation; AXBN with the config's constants."""
    kind: type[Adaptation] = ADAPTATIONS.find(config.adaptation)
    if issubclass(kind, AXBN):
        return kind(config.kalman_q, config.kalman_r, config.kalman_p0, config.gain_interval)
    return kind()
