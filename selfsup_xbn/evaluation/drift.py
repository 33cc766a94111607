"""Drift of embeddings between steps, and the gap between the moments of a queue and of a batch.

Equations and figures are those of "Adaptive Cross Batch Normalization for Metric Learning" (arXiv 2303.17127). The
results remain on the device, so the host does not wait for them.

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
    """Euclidean distances between two unit embeddings of each image of a batch, in [0, 2].

    Attributes:
        mean: The mean over the batch.
        maximum: The maximum over the batch.
    """

    mean: Float32[Tensor, ""]
    maximum: Float32[Tensor, ""]


class FeatureDrift:
    """Measure the feature drift of a fixed batch (Eq. 5, Fig. 3).

    The drift of an image is ||z_k - z_(k-1)||_2 for its unit embeddings z of consecutive steps. The embeddings are
    computed in eval mode and without gradient. The encoder does not change.

    With several processes, each of them embeds a shard of the batch.

    Args:
        encoder: A function from images to embeddings [B, D] of any length: a module, a method of a module, or another
            callable.
        images: The batch. Each update costs a forward pass.

    Example:
        >>> encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
        >>> drift = FeatureDrift(encoder, torch.randn(8, 3, 4, 4))
        >>> drift.update()
        >>> drift.update()
        Drift(mean=tensor(0.), maximum=tensor(0.))
    """

    def __init__(
        self, encoder: Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B D"]], images: Float[Tensor, "B C H W"]
    ) -> None:
        self.encoder = encoder
        self.images, self.count = images[shard_slice(len(images))], len(images)
        self.previous: Tensor | None = None

    @torch.no_grad()
    def update(self) -> Drift | None:
        """Return the drift since the last call, or ``None`` in the first call. All processes must call it."""
        current = self._embed()
        previous, self.previous = self.previous, current
        if previous is None:
            return None
        distance = gather(torch.linalg.vector_norm(current - previous, dim=1), self.count)
        return Drift(distance.mean(), distance.max())

    @torch.no_grad()
    def embeddings(self) -> Float[Tensor, "B D"]:
        """Return the current unit embeddings of the whole batch. All processes must call it."""
        return gather(self._embed(), self.count)

    def _embed(self) -> Float[Tensor, "b D"]:
        with evaluating(self.encoder):
            return F.normalize(self.encoder(self.images).float(), dim=1)


class MomentGap(NamedTuple):
    """Differences between two sets of moments, as root mean squares over the dimensions. They are 0 for equal moments.

    Attributes:
        mean: The difference of the means in units of the batch's standard deviation.
        std: The natural logarithm of the ratio of the standard deviations. A ratio of 2 or 1 / 2 gives 0.69.
    """

    mean: Float[Tensor, ""]
    std: Float[Tensor, ""]


def moment_gap(queue: Moments, batch: Moments) -> MomentGap:
    """Return the gap between the moments of a queue and those of the current batch, which XBN removes.

    ``mean = sqrt(avg_d ((mean_q - mean_b) / std_b)^2)`` and ``std = sqrt(avg_d log(std_q / std_b)^2)``. Dimensions that
    are constant or not finite in the queue or in the batch are ignored. If all dimensions are ignored, the gap is NaN.

    Args:
        queue: The moments of the queue.
        batch: The moments of the batch.

    Example:
        >>> batch = Moments(torch.zeros(2), torch.ones(2))
        >>> moment_gap(Moments(torch.ones(2), torch.ones(2)), batch)
        MomentGap(mean=tensor(1.), std=tensor(0.))
    """
    varies = ~(queue.constant() | batch.constant()) & (queue.std / batch.std).isfinite()
    return MomentGap(
        mean=_root_mean_square((queue.mean - batch.mean) / batch.std, varies),
        std=_root_mean_square((queue.std / batch.std).log(), varies),
    )


def _root_mean_square(values: Float[Tensor, "D"], kept: Bool[Tensor, "D"]) -> Float[Tensor, ""]:
    return (torch.where(kept, values, 0).square().sum() / kept.sum()).sqrt()
