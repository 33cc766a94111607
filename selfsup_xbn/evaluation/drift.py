"""How far embeddings move from one step to the next, and how far a queue's moments are from a batch's.

Equations and figures are those of "Adaptive Cross Batch Normalization for Metric Learning" (arXiv 2303.17127). All
results stay on the device, so neither measure makes a training step wait for it.

Axis legend: B batch, D dimensions, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from selfsup_xbn.evaluation.features import evaluating
from selfsup_xbn.memory.moments import Moments
from selfsup_xbn.utils.distributed import gather, shard_slice


class Drift(NamedTuple):
    """Distances between two embeddings of the same images, over the batch: from 0 to 2, the diameter of the sphere."""

    mean: Float32[Tensor, ""]
    maximum: Float32[Tensor, ""]


class FeatureDrift:
    """Feature drift of a fixed batch (Eq. 5, Fig. 3): ||z_k - z_(k-1)||_2 of unit embeddings of consecutive steps.

    The embeddings are taken in eval mode, without gradient; modes, weights and running statistics stay as they are.

    Args:
        encoder: images to embeddings [B, D], normalised here; a module, a module's method, or any other callable.
        images: the batch to watch, as the encoder takes it; it costs a forward pass per update. Several processes
            embed a shard of it each, and all must call ``update``.
    """

    def __init__(
        self, encoder: Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B D"]], images: Float[Tensor, "B C H W"]
    ) -> None:
        self.encoder = encoder
        self.images, self.count = images[shard_slice(len(images))], len(images)
        self.previous: Tensor | None = None

    @torch.no_grad()
    def update(self) -> Drift | None:
        """Drift since the last call; None at the first, which only looks. Call it after each step."""
        current = self._embed()
        previous, self.previous = self.previous, current
        if previous is None:
            return None
        distance = gather(torch.linalg.vector_norm(current - previous, dim=1), self.count)
        return Drift(distance.mean(), distance.max())

    @torch.no_grad()
    def embeddings(self) -> Float[Tensor, "B D"]:
        """Unit embeddings of the whole batch as the encoder is now; all processes must call it."""
        return gather(self._embed(), self.count)

    def _embed(self) -> Float[Tensor, "b D"]:
        with evaluating(self.encoder):
            return F.normalize(self.encoder(self.images).float(), dim=1)


class MomentGap(NamedTuple):
    """Root mean square over the dimensions; 0 and 0 where the moments agree.

    Attributes:
        mean: difference of the means in units of the batch's standard deviation.
        std: natural logarithm of the ratio of the standard deviations: 0.69 is a factor of 2, either way.
    """

    mean: Float[Tensor, ""]
    std: Float[Tensor, ""]


def moment_gap(queue: Moments, batch: Moments) -> MomentGap:
    """What XBN removes: the gap between the moments of a queue and those of the current batch, per dimension.

    ``mean = sqrt(avg_d ((mean_q - mean_b) / std_b)^2)``, ``std = sqrt(avg_d log(std_q / std_b)^2)``. Dimensions that
    are constant or not finite on either side, where neither is defined, are left out; NaN where all are.
    """
    varies = ~(queue.constant() | batch.constant()) & (queue.std / batch.std).isfinite()
    return MomentGap(
        mean=_root_mean_square((queue.mean - batch.mean) / batch.std, varies),
        std=_root_mean_square((queue.std / batch.std).log(), varies),
    )


def _root_mean_square(values: Float[Tensor, "D"], kept: Bool[Tensor, "D"]) -> Float[Tensor, ""]:
    return (torch.where(kept, values, 0).square().sum() / kept.sum()).sqrt()
