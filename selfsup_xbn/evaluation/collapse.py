"""Detection of collapsed embeddings.

Axis legend: B batch, D dimensions.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

COLLAPSED = 0.01
"""Embeddings have collapsed if their standard deviation is below this fraction of that on the sphere."""


def embedding_std(unit: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Return the standard deviation of unit embeddings over the batch, averaged over the dimensions.

    It is about 1 / sqrt(D) for embeddings that are spread over the sphere, and 0 if all embeddings are equal (Chen and
    He, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566, section 4.1).

    Args:
        unit: Embeddings of length 1.

    Example:
        >>> import torch
        >>> embedding_std(torch.tensor([[0.6, 0.8], [0.6, 0.8]]))
        tensor(0.)
    """
    return unit.std(0).mean()


def collapse_warning(std: float, dim: int) -> str:
    """Return a warning for collapsed embeddings.

    Args:
        std: The result of ``embedding_std``.
        dim: The number of dimensions D.

    Returns:
        The warning, or "" if the embeddings have not collapsed.

    Example:
        >>> collapse_warning(0.1, dim=64)
        ''
    """
    sphere = dim**-0.5
    if std >= COLLAPSED * sphere:
        return ""
    return (
        f"the embedding has collapsed: its standard deviation over a batch is {std:.2g}, expected about {sphere:.2g} "
        "for embeddings spread over the sphere; try a smaller --lr, a larger --temperature or another --seed"
    )
