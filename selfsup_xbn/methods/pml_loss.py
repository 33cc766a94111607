"""Adapter of the losses and miners of pytorch-metric-learning to the queue.

Axis legend: B batch, D dimensions.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor, nn

from selfsup_xbn.errors import UserError, near, one_line
from selfsup_xbn.integrations.pml_mining import mine_without_self
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.following import features


class PmlLoss(nn.Module):
    """Loss and miner of pytorch-metric-learning, with the rows of the queue as reference embeddings (``ref_emb``).

    It is a module: the parameters of the loss are trained and saved with the method.

    Args:
        loss: a pair or triplet loss of pytorch-metric-learning.
        miner: a miner of pytorch-metric-learning; None counts all pairs.
    """

    def __init__(self, loss: nn.Module, miner: nn.Module | None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int64[Tensor, "B"],
        queue: FeatureQueue | None = None,
        self_indices: Int64[Tensor, "B"] | None = None,
        *,
        adapted_to: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss. The arguments are those of ``MemoryLoss``."""
        if len(embeddings) == 0:
            return embeddings.sum()
        if queue is None:
            return self.loss(embeddings, labels, self.miner(embeddings, labels) if self.miner else None)
        assert queue.labels is not None
        rows = features(queue, adapted_to).to(embeddings.dtype)
        row_labels = queue.labels[: len(rows)]
        if self_indices is None:
            self_indices = torch.full_like(labels, -1)
        pairs = mine_without_self(self.miner, embeddings, labels, rows, row_labels, self_indices)
        return self.loss(embeddings, labels, pairs, rows, row_labels)


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
    temperature = loss_args.get("temperature", 1)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise UserError(f"--loss-args: temperature: expected a number above 0, got {temperature!r}")
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
        hint = f"{near(name, names)}; choose from {', '.join(names)}" + ", none" * (flag == "--miner")
        raise UserError(f"{flag}: expected a class of pytorch-metric-learning, got {name!r}{hint}")
    try:
        with torch.device("cpu"):  # for a trial; the method is moved to its device afterwards
            return getattr(module, name)(**arguments)
    except Exception as error:  # classes of the library raise exceptions of many types
        known = _arguments_of(getattr(module, name))
        for argument in arguments:
            if argument not in known:
                hint = near(argument, known) or f"; expected one of {', '.join(known)}"
                raise UserError(f"{flag}-args: {name} has no argument {argument!r}{hint}") from None
        raise UserError(f"{flag}-args: {name} does not accept {arguments}: {one_line(error)}") from None


def _arguments_of(kind: type) -> list[str]:
    """Return the names of the arguments of a class, which passes those of its base classes on as ``kwargs``."""
    constructors = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    own = constructors[: constructors.index(nn.Module.__init__)]
    parameters = [value for constructor in own for value in inspect.signature(constructor).parameters.values()]
    return list(dict.fromkeys(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"))
