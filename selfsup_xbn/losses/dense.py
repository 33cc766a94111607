"""The sums of a loss from one matrix of similarities, with plain autograd: slower and larger, to be checked by eye.

Axis legend: B anchors, D dimensions.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selfsup_xbn.losses.blockwise import PairSums
from selfsup_xbn.losses.pairs import NOT_COUNTED, Pairs


def pair_sums(anchors: Float[Tensor, "B D"], pairs: Pairs, *, include_positives: bool = False) -> PairSums:
    """Return what ``blockwise.pair_sums`` does; gradient flows to the rows too if they depend on the batch."""
    rows, logits, positive, negative = pairs.matrix(anchors)
    counted = positive | negative if include_positives else negative
    logsumexp = logits.masked_fill(~counted, NOT_COUNTED).logsumexp(1)
    positive_cosines = (anchors * (positive.to(rows.dtype) @ rows)).sum(1)
    return PairSums(logsumexp, positive_cosines, positive.sum(1), negative.sum(1))


def positive_softplus(anchors: Float[Tensor, "B D"], offset: Float[Tensor, "B"], pairs: Pairs) -> Float[Tensor, "B"]:
    """Return what ``blockwise.positive_softplus`` does."""
    _, logits, positive, _ = pairs.matrix(anchors)
    return (F.softplus(offset[:, None] - logits, threshold=40) * positive).sum(1)
