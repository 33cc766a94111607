"""Heads by name: from features to embeddings.

Axis legend: B batch, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class UnitLength(nn.Module):
    """Rows of Euclidean length 1."""

    def forward(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return F.normalize(z)


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    # MoCo v1 (arXiv 1911.05722) and v2 (arXiv 2003.04297)
    "linear": lambda features, dim: nn.Linear(features, dim),
    "mlp": lambda features, dim: nn.Sequential(
        nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim)
    ),
    # Table 3 of the paper; the L2 normalisation of "l2" is the method's own
    "l2": lambda features, dim: nn.Linear(features, dim),
    "l2+ln": lambda features, dim: nn.Sequential(nn.Linear(features, dim), UnitLength(), nn.LayerNorm(dim)),
    "l2+bn": lambda features, dim: nn.Sequential(nn.Linear(features, dim), UnitLength(), nn.BatchNorm1d(dim)),
}
