"""Methods: what a training step is. Each reads like its paper's algorithm."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.feature_queue import FeatureQueue
from selfsup_xbn.models import Encoder


class Method(Protocol):
    """What the loop asks of a method, which is otherwise a module.

    Attributes:
        encoder: the one that is trained, evaluated and kept.
        queue: the memory; None where there is none.
    """

    @property
    def encoder(self) -> Encoder: ...

    @property
    def queue(self) -> FeatureQueue | None: ...

    def __call__(
        self, views: tuple[Float[Tensor, "B C S S"], ...], labels: Int64[Tensor, "B"], progress: float
    ) -> Float[Tensor, ""]:
        """The loss of a step, at a fraction of the run in [0, 1)."""
        ...
