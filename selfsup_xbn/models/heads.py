"""Heads by name: modules that map features [B, F] to embeddings [B, D].

Axis legend: B batch, F features, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class UnitLength(nn.Module):
    """Divide each row by its Euclidean norm."""

    def forward(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return rows of norm 1."""
        return F.normalize(z)


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    # MoCo v1 (arXiv 1911.05722) and v2 (arXiv 2003.04297)
    "linear": lambda features, dim: nn.Linear(features, dim),
    "mlp": lambda features, dim: nn.Sequential(
        nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim)
    ),
    # Table 3 of arXiv 2303.17127; for "l2" the method normalizes the embeddings
    "l2": lambda features, dim: nn.Linear(features, dim),
    "l2+ln": lambda features, dim: nn.Sequential(nn.Linear(features, dim), UnitLength(), nn.LayerNorm(dim)),
    "l2+bn": lambda features, dim: nn.Sequential(nn.Linear(features, dim), UnitLength(), nn.BatchNorm1d(dim)),
}
