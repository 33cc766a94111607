"""A map of embeddings in the plane, and which images stand on it.

Axis legend: N samples, n chosen samples, C classes, D dimensions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from selfsup_xbn.evaluation.neighbours import normalize_features

METHOD = "t-SNE"


def spread_classes(labels: Int64[Tensor, "N"], count: int) -> Int64[Tensor, "C"]:
    """At most ``count`` of the classes that occur, evenly spread over their numbers: the same at each call."""
    names = labels.unique()
    return names[torch.linspace(0, len(names) - 1, min(count, len(names))).round().long()]


def first_of_each(labels: Int64[Tensor, "N"], classes: Int64[Tensor, "C"], count: int) -> Int64[Tensor, "n"]:
    """Places of the first ``count`` samples of each class, in order."""
    return torch.cat([(labels == name).nonzero().flatten()[:count] for name in classes]).sort().values


def plane_of(embeddings: Float[Tensor, "N D"]) -> Float32[Tensor, "N 2"]:
    """Places in the plane by t-SNE of the unit embeddings; x, the longer side, spans 0 to 1; y begins at 0.

    Deterministic: t-SNE starts from the first two principal components. Distances far apart mean little.

    Raises:
        UserError: an embedding is not finite.
    """
    from sklearn.manifold import TSNE

    rows = normalize_features(embeddings, "embeddings").cpu().numpy()
    if len(rows) < 4:  # too few to have neighbours
        return torch.linspace(0, 1, len(rows))[:, None].expand(-1, 2).contiguous()
    start = "pca" if rows.shape[1] > 1 else "random"
    perplexity = min(30, (len(rows) - 1) / 3)
    found = TSNE(init=start, perplexity=perplexity, random_state=0, n_jobs=1).fit_transform(rows)
    places = torch.from_numpy(found).float()
    places = places - places.amin(0)
    places = places[:, places.amax(0).argsort(descending=True)]
    return places / places.amax().clamp_min(1e-9)
