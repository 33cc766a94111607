"""Mining by PyTorch Metric Learning (PML) in a queue that holds the anchors' own rows.

PML leaves an anchor out of its own pairs only where a batch is mined in itself. Against a queue that holds the batch,
the nearest row of an anchor's class is its own.

Axis legend: B anchors, D dimensions, n rows, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from pytorch_metric_learning import miners
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

Pairs = tuple[Tensor, ...]
"""Pairs (a, p, a, n) or triplets (a, p, n): indices of anchors a and of rows p and n, each [P]."""

ACROSS_ANCHORS = (miners.HDCMiner, miners.UniformHistogramMiner)
"""Miners that choose among the pairs of all anchors: they have no result for one anchor."""


def mine_without_self(
    miner: Callable[..., Pairs] | None,
    embeddings: Float[Tensor, "B D"],
    labels: Int64[Tensor, "B"],
    rows: Float[Tensor, "n D"],
    row_labels: Int64[Tensor, "n"],
    self_indices: Int64[Tensor, "B"],
) -> Pairs:
    """Return the pairs or triplets that a miner selects if each anchor's own row is left out.

    The miner is called once for all anchors. An anchor of which it selects no positive but the own row, although there
    are others, is mined again without that row.

    Args:
        miner: a PML miner; None for all pairs.
        embeddings: anchors.
        labels: class of each anchor.
        rows: rows of the queue.
        row_labels: class of each row.
        self_indices: row of each anchor itself; -1 for none.
    """
    if miner is None:
        return without_self(lmu.get_all_pairs_indices(labels, row_labels), self_indices)
    mined = miner(embeddings, labels, rows, row_labels)
    pairs = without_self(mined, self_indices)
    if isinstance(miner, ACROSS_ANCHORS):
        return pairs
    again = torch.zeros_like(labels, dtype=torch.bool)
    again[mined[0]] = True
    again[pairs[0]] = False
    again[again.clone()] = (labels[again][:, None] == row_labels).sum(1) > 1
    anchors = again.nonzero()[:, 0].tolist()
    if not anchors:
        return pairs
    parts = [_without_anchors(pairs, again)]
    rows, row_labels = rows.clone(), row_labels.clone()
    last = len(rows) - 1
    for anchor in anchors:
        own = int(self_indices[anchor])
        row, label = rows[own].clone(), row_labels[own].clone()
        rows[own], row_labels[own] = rows[last], row_labels[last]
        one = slice(anchor, anchor + 1)
        found = miner(embeddings[one], labels[one], rows[:last], row_labels[:last])
        parts.append(_in_place(found, anchor, own, last))
        rows[own], row_labels[own] = row, label
    pairs = tuple(torch.cat(indices) for indices in zip(*parts, strict=True))
    if isinstance(miner, miners.BaseMiner):
        miner.output_assertion(pairs)  # records the number of pairs
    return pairs


def without_self(pairs: Pairs, self_indices: Int64[Tensor, "B"]) -> Pairs:
    """Return the pairs or triplets whose positive is not the row of the anchor itself."""
    anchor, positive, *negative = pairs
    others = positive != self_indices[anchor]
    return (anchor[others], positive[others], *(negative if len(pairs) == 4 else [negative[0][others]]))


def _without_anchors(pairs: Pairs, dropped: Tensor) -> Pairs:
    """Return the pairs or triplets without those of some anchors."""
    kept: list[Any] = [~dropped[pairs[0]]] * len(pairs)
    if len(pairs) == 4:
        kept[2:] = [~dropped[pairs[2]]] * 2
    return tuple(index[keep] for index, keep in zip(pairs, kept, strict=True))


def _in_place(pairs: Pairs, anchor: int, own: int, last: int) -> Pairs:
    """Return pairs of one anchor, mined with the last row in the place of its own, as indices of batch and queue."""
    anchors = (0,) if len(pairs) == 3 else (0, 2)
    return tuple(
        torch.full_like(index, anchor) if place in anchors else index.masked_fill(index == own, last)
        for place, index in enumerate(pairs)
    )
