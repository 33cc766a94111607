"""Blockwise equivalents of the losses and miners of PyTorch Metric Learning (PML)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import PairMarginMiner
from torch import Tensor, nn

from selfsup_xbn.losses import PairMargin, nt_xent, sup_con

BLOCKWISE = {peer.SupConLoss: sup_con, peer.NTXentLoss: nt_xent}


def blockwise_loss(
    loss: Any, miner: Any, on_pairs: Callable[[Tensor, Tensor], None], implementation: str
) -> Callable[..., Tensor] | None:
    """Return the function of ``selfsup_xbn.losses`` that equals a PML loss and miner, or None.

    Args:
        loss: a PML loss.
        miner: a PML miner; None counts all pairs.
        on_pairs: called with the numbers of positive and negative pairs that the miner selects.
        implementation: implementation of the function.
    """
    function = BLOCKWISE.get(type(loss))
    margin = None if miner is None else _pair_margin(miner)
    if function is None or not _has_default_settings(loss) or (margin is None) != (miner is None):
        return None
    if not all(is_unchanged(module) for part in (loss, miner) if part is not None for module in part.modules()):
        return None
    record = None if margin is None else on_pairs
    return functools.partial(
        function, temperature=loss.temperature, miner=margin, on_pairs=record, implementation=implementation
    )


def is_unchanged(module: nn.Module) -> bool:
    """Return whether a module has no hook, and no method that was replaced for this instance."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not any(callable(getattr(type(module), name, None)) for name in vars(module))


def _has_default_settings(loss: Any) -> bool:
    """Return whether a SupConLoss or NTXentLoss has PML's default settings. A regularizer implies another reducer."""
    return (
        type(loss.reducer) is type(loss.get_default_reducer())
        and getattr(loss.reducer, "high", None) is None
        and _is_cosine(loss.distance)
        and isinstance(loss.temperature, int | float)
    )


def _is_cosine(distance: Any) -> bool:
    return type(distance) is CosineSimilarity and distance.p == 2 and distance.power == 1


def _pair_margin(miner: Any) -> PairMargin | None:
    """Return the margins of a PairMarginMiner with cosine or Euclidean distance of unit vectors, or None."""
    if type(miner) is not PairMarginMiner:
        return None
    positive, negative, distance = miner.pos_margin, miner.neg_margin, miner.distance
    if _is_cosine(distance):
        return PairMargin(positive, negative, "cosine")
    of_unit_vectors = type(distance) is LpDistance and distance.normalize_embeddings
    if of_unit_vectors and distance.p == 2 and distance.power == 1 and min(positive, negative) >= 0:
        return PairMargin(positive, negative)
    return None
