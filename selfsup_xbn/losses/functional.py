"""Losses of a batch against a queue, block by block: InfoNCE, and SupCon and NT-Xent with a pair margin miner.

All are log-sum-exps over similarities to the queue, made in one pass over it (``queue_scan``). Statistics and products
are at least float32, under autocast too.

Axis legend: B anchors, M queue rows, D dimensions, E slots to leave out per anchor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.losses.blockwise import (
    Scan,
    class_reader,
    scan_classes,
    scan_negative_pairs,
    scan_negatives,
    scan_positives,
    sup_con_of,
)
from selfsup_xbn.losses.online import FLOOR
from selfsup_xbn.losses.pairs import PairRule
from selfsup_xbn.memory.feature_queue import FeatureQueue


class PairMargin(NamedTuple):
    """Which pairs a loss sees: positives further apart than ``positive``, negatives nearer than ``negative``.

    Args:
        positive, negative: margins, in the distance's unit.
        distance: ``"euclidean"`` of the unit vectors, as PML's PairMarginMiner measures by default and the paper
            does, or ``"cosine"``: then margins are similarities, and positives *below* ``positive`` and negatives
            *above* ``negative`` are kept.
    """

    positive: float = 0.2
    negative: float = 0.8
    distance: str = "euclidean"

    def similarity_bounds(self) -> tuple[float, float]:
        """Positives are kept below the first cosine similarity, negatives above the second.

        For unit vectors d^2 = 2 - 2 cos, so d > m is cos < 1 - m^2 / 2.
        """
        if self.distance == "cosine":
            return self.positive, self.negative
        if self.distance != "euclidean":
            raise UserError(f"expected miner distance 'euclidean' or 'cosine', got {self.distance!r}")
        return 1 - self.positive**2 / 2, 1 - self.negative**2 / 2

    @staticmethod
    def rule(miner: PairMargin | None, labels: Int64[Tensor, "B"]) -> PairRule:
        """The pairs that the miner keeps of anchors with these labels; all of them without one."""
        return PairRule(labels) if miner is None else PairRule(labels, *miner.similarity_bounds())


class PairLoss(NamedTuple):
    """A loss, and how many pairs it is made of."""

    value: Float[Tensor, ""]
    positives: Int64[Tensor, ""]
    negatives: Int64[Tensor, ""]


def info_nce(
    q: Float[Tensor, "B D"],
    k: Float[Tensor, "B D"],
    queue: FeatureQueue,
    temperature: float = 0.1,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE of queries and their keys against the queue's rows as negatives (MoCo, arXiv 1911.05722, Eq. 1).

    ``-log(exp(q.k/T) / (exp(q.k/T) + sum_j exp(q.r_j/T)))`` with all vectors of unit length, mean over the batch.

    Args:
        q, k: queries and keys, of any length; row i of one belongs to row i of the other.
        queue: the negatives r_j.
        temperature: T > 0.
        own_slots: where the keys themselves stand in the queue, if they do: the row that is each query's own
            positive is no negative of it. -1 for none.
    """
    return scan_negatives(q, k, queue, temperature, own_slots)


def sup_con(
    embeddings: Float[Tensor, "B D"],
    labels: Int64[Tensor, "B"],
    queue: FeatureQueue | None = None,
    *,
    temperature: float = 0.1,
    miner: PairMargin | None = None,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> Float[Tensor, ""]:
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362, Eq. 2) against the queue, or in the batch.

    For anchor i with positives P(i) and kept pairs A(i), positives among them::

        L_i = logsumexp_{a in A(i)} s_ia - mean_{p in P(i)} s_ip,        s = cos / T

    averaged over the anchors with L_i > 0, and 0 where the batch has no negative pair at all: value and gradient are
    those of PML's SupConLoss after a PairMarginMiner.

    Args:
        embeddings: z, of any length.
        labels: class of each embedding.
        queue: a queue with labels; None: the batch itself is the reference, self left out, gradient to both sides.
        temperature: T > 0.
        miner: which pairs count; None for all.
        own_slots: where the batch itself stands in the queue, if it does; -1 for none.
    """
    if queue is None:
        return sup_con_of(_scan_batch(embeddings, temperature, PairMargin.rule(miner, labels)))[0]
    reader = class_reader(queue, temperature, own_slots, PairMargin.rule(miner, labels))
    return scan_classes(embeddings, reader, count_negatives=False)[0]


def sup_con_pairs(
    embeddings: Float[Tensor, "B D"],
    labels: Int64[Tensor, "B"],
    queue: FeatureQueue,
    *,
    temperature: float = 0.1,
    miner: PairMargin | None = None,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> PairLoss:
    """``sup_con`` against a queue, with the number of its pairs."""
    reader = class_reader(queue, temperature, own_slots, PairMargin.rule(miner, labels))
    return PairLoss(*scan_classes(embeddings, reader))


def nt_xent(
    embeddings: Float[Tensor, "B D"],
    labels: Int64[Tensor, "B"],
    queue: FeatureQueue,
    *,
    temperature: float = 0.07,
    miner: PairMargin | None = None,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> Float[Tensor, ""]:
    """NT-Xent of labelled embeddings against the queue: each positive pair alone among its anchor's negatives.

    The mean over the kept positive pairs (i, p), with N(i) the kept negatives of i, of::

        log(1 + exp(n_i - s_ip)),        n_i = logsumexp_{a in N(i)} s_ia,        s = cos / T

    and 0 where there is no positive or no negative pair: value and gradient are those of PML's NTXentLoss, which makes
    a matrix of positive pairs x negative pairs. Here the queue is read twice, for n and for the pairs.

    Args: those of ``sup_con``.
    """
    return nt_xent_pairs(embeddings, labels, queue, temperature=temperature, miner=miner, own_slots=own_slots).value


def nt_xent_pairs(
    embeddings: Float[Tensor, "B D"],
    labels: Int64[Tensor, "B"],
    queue: FeatureQueue,
    *,
    temperature: float = 0.07,
    miner: PairMargin | None = None,
    own_slots: Int64[Tensor, "B *E"] | None = None,
) -> PairLoss:
    """``nt_xent`` with the number of its pairs."""
    unit = _unit(embeddings)
    reader = class_reader(queue, temperature, own_slots, PairMargin.rule(miner, labels))
    logsumexp, negatives = scan_negative_pairs(unit, reader)
    losses, count = scan_positives(unit, logsumexp, reader)
    positives = count.sum()
    return PairLoss(losses.sum() / positives.clamp(min=1), positives.long(), negatives.sum())


def _unit(anchors: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """At unit length and in float32 at least."""
    with torch.autocast(anchors.device.type, enabled=False):
        return F.normalize(anchors.to(torch.promote_types(anchors.dtype, torch.float32)), dim=1)


def _scan_batch(embeddings: Float[Tensor, "B D"], temperature: float, rule: PairRule) -> Scan:
    """The sums over the batch in place of a queue, self left out; gradient flows to both sides."""
    unit = _unit(embeddings)
    with torch.autocast(unit.device.type, enabled=False):
        cosine = unit @ unit.T
        others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        positive, negative = (pairs & others for pairs in rule.select(cosine.detach(), rule.labels))
        logits = cosine / temperature
        kept = logits.masked_fill(~(positive | negative), FLOOR)
        positives = positive.sum(1).to(unit.dtype)
        return Scan(kept.logsumexp(1), (logits * positive).sum(1), positives, negative.sum(1))
