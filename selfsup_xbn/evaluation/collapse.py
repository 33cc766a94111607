"""Whether an encoder still tells images apart.

Axis legend: B batch, C channels, H height, W width, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selfsup_xbn.evaluation.features import evaluating

COLLAPSED = 0.01
"""Share of a sphere's standard deviation below which an embedding counts as collapsed."""


@torch.no_grad()
def embedding_std(
    encoder: Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B D"]], images: Float[Tensor, "B C H W"]
) -> Float[Tensor, ""]:
    """Standard deviation of the unit embeddings over the batch, mean over the dimensions (SimSiam, arXiv 2011.10566).

    1 / sqrt(D) for embeddings spread over the sphere, 0 where all images have one embedding. In eval mode; modes,
    weights and running statistics stay as they are.
    """
    with evaluating(encoder):
        return F.normalize(encoder(images).float(), dim=1).std(0).mean()


def collapse_warning(std: float, dim: int) -> str:
    """A line that names the value, for embeddings of D dimensions that have collapsed; "" for others."""
    sphere = dim**-0.5
    if std >= COLLAPSED * sphere:
        return ""
    return (
        f"the embedding has collapsed: its standard deviation over a batch is {std:.2g}, where {sphere:.2g} fills "
        "the sphere; try a smaller --lr, a larger --temperature or another --seed"
    )
