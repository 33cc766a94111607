"""Adapter of the losses and miners of pytorch-metric-learning to the queue.

Axis legend: B batch, D dimensions.
"""

from __future__ import annotations

import inspect
from typing import Any

from jaxtyping import Float, Int64
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.utils import loss_and_miner_utils as pml_pairs
from torch import Tensor, nn

from selfsup_xbn.errors import UserError, near
from selfsup_xbn.memory.feature_queue import FeatureQueue


class PmlLoss:
    """Loss and miner of pytorch-metric-learning, with the rows of the queue as reference embeddings (``ref_emb``).

    Args:
        loss: a pair or triplet loss of pytorch-metric-learning.
        miner: a miner of pytorch-metric-learning; None counts all pairs.
    """

    def __init__(self, loss: nn.Module, miner: nn.Module | None) -> None:
        self.loss, self.miner = loss, miner

    def __call__(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int64[Tensor, "B"],
        queue: FeatureQueue | None = None,
        self_indices: Int64[Tensor, "B"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss.

        Args:
            embeddings: unit embeddings of the batch, the anchors.
            labels: class of each anchor.
            queue: the queue with labels; None for pairs within the batch.
            self_indices: slot of each anchor in the queue, which is excluded from its pairs.
        """
        if queue is None:
            return self.loss(embeddings, labels, self.miner(embeddings, labels) if self.miner else None)
        assert queue.labels is not None
        rows = queue.features().to(embeddings.dtype)
        row_labels = queue.labels[: len(rows)]
        if self.miner:
            pairs = self.miner(embeddings, labels, rows, row_labels)
        else:
            pairs = pml_pairs.get_all_pairs_indices(labels, row_labels)
        if self_indices is not None:
            pairs = _without_self(pairs, self_indices)
        return self.loss(embeddings, labels, pairs, rows, row_labels)


def _without_self(pairs: tuple[Tensor, ...], self_indices: Int64[Tensor, "B"]) -> tuple[Tensor, ...]:
    """Return the pairs (a, p, a, n) or triplets (a, p, n) whose positive is not the row of the anchor itself."""
    anchor, positive, *negative = pairs
    others = positive != self_indices[anchor]
    return (anchor[others], positive[others], *(negative if len(pairs) == 4 else [negative[0][others]]))


def make_pml_loss(loss: str, loss_args: dict[str, Any], miner: str, miner_args: dict[str, Any]) -> PmlLoss:
    """Return a loss and a miner of pytorch-metric-learning by their class names.

    Args:
        loss: class name of the loss.
        loss_args: arguments of the loss.
        miner: class name of the miner; ``""`` for no miner.
        miner_args: arguments of the miner.

    Raises:
        UserError: the loss or the miner is unknown, or does not accept its arguments.
    """
    supported = pml_losses.CrossBatchMemory.supported_losses()
    if loss not in supported:
        known = ", ".join(supported)
        raise UserError(
            f"--loss: expected a loss that supports a queue, got {loss!r}{near(loss, supported)}; choose from {known}"
        )
    criterion = _from_pml(pml_losses, loss, loss_args, "--loss")
    return PmlLoss(criterion, _from_pml(pml_miners, miner, miner_args, "--miner") if miner else None)


def _from_pml(module: Any, name: str, arguments: dict[str, Any], flag: str) -> nn.Module:
    names = [other for other, kind in vars(module).items() if inspect.isclass(kind) and not other.startswith("Base")]
    if name not in names:
        raise UserError(f"{flag}: expected a class of pytorch-metric-learning, got {name!r}{near(name, names)}")
    try:
        return getattr(module, name)(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{flag}-args: {name} does not accept {arguments}: {error}") from None
