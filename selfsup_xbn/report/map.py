"""Two-dimensional map of embeddings, and the selection of its images.

Axis legend: N samples, n selected samples, C classes, D embedding dimension.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from selfsup_xbn.evaluation.neighbors import normalize_features

METHOD = "t-SNE"


def spread_classes(labels: Int64[Tensor, "N"], count: int) -> Int64[Tensor, "C"]:
    """Select classes that are spread evenly over the labels. The selection is deterministic.

    Args:
        labels: Label of each sample, [N].
        count: Largest number of classes.

    Returns:
        Labels of the selected classes in ascending order, [C].

    Example:
        >>> spread_classes(torch.tensor([1, 3, 3, 5, 7, 9]), 3).tolist()
        [1, 5, 9]
    """
    names = labels.unique()
    return names[torch.linspace(0, len(names) - 1, min(count, len(names))).round().long()]


def first_of_each(labels: Int64[Tensor, "N"], classes: Int64[Tensor, "C"], count: int) -> Int64[Tensor, "n"]:
    """Return the indices of the first samples of each class.

    Args:
        labels: Label of each sample, [N].
        classes: Labels of the classes, [C].
        count: Largest number of samples per class.

    Returns:
        Indices in ascending order, [n].

    Example:
        >>> first_of_each(torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 1]), 1).tolist()
        [0, 1]
    """
    return torch.cat([(labels == name).nonzero().flatten()[:count] for name in classes]).sort().values


def plane_of(embeddings: Float[Tensor, "N D"]) -> Float32[Tensor, "N 2"]:
    """Return the t-SNE positions of the normalized embeddings.

    The result is deterministic, as t-SNE is initialized with the first two principal components.

    Args:
        embeddings: Embeddings, [N, D].

    Returns:
        Positions, [N, 2]. The longer side of the map is x and spans [0, 1]. The smallest y is 0.

    Raises:
        UserError: An embedding is not finite.
    """
    from sklearn.manifold import TSNE

    rows = normalize_features(embeddings, "embeddings").cpu().numpy()
    if len(rows) < 4:  # too few for t-SNE
        return torch.linspace(0, 1, len(rows))[:, None].expand(-1, 2).contiguous()
    start = "pca" if rows.shape[1] > 1 else "random"
    perplexity = min(30, (len(rows) - 1) / 3)
    tsne = TSNE(init=start, perplexity=perplexity, random_state=0, n_jobs=1)
    positions = torch.from_numpy(tsne.fit_transform(rows)).float()
    positions = positions - positions.amin(0)
    positions = positions[:, positions.amax(0).argsort(descending=True)]
    return positions / positions.amax().clamp_min(1e-9)
