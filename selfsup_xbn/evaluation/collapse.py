"""Whether an encoder still tells images apart.

Axis legend: B batch, D dimensions.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

COLLAPSED = 0.01
"""Share of a sphere's standard deviation below which an embedding counts as collapsed."""


def embedding_std(unit: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Standard deviation of unit embeddings over the batch, mean over the dimensions (SimSiam, arXiv 2011.10566).

    1 / sqrt(D) for embeddings spread over the sphere, 0 where all images have one embedding.
    """
    return unit.std(0).mean()


def collapse_warning(std: float, dim: int) -> str:
    """A line that names the value, for embeddings of D dimensions that have collapsed; "" for others."""
    sphere = dim**-0.5
    if std >= COLLAPSED * sphere:
        return ""
    return (
        f"the embedding has collapsed: its standard deviation over a batch is {std:.2g}, expected about {sphere:.2g} "
        "for embeddings spread over the sphere; try a smaller --lr, a larger --temperature or another --seed"
    )
