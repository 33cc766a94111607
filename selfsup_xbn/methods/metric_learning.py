"""Supervised metric learning with a cross-batch memory: XBM (arXiv 1912.06798), XBN and AXBN (arXiv 2303.17127).

Axis legend: B batch, b this process's shard of it, C channels, S side of an image, D dimensions, M queue rows.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.config.parsing import parse_arguments
from selfsup_xbn.config.schema import Config, SuperviseConfig
from selfsup_xbn.errors import UserError
from selfsup_xbn.losses import PairMargin, sup_con
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.methods.base import Method, queue_from_config
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.utils.distributed import gather


@runtime_checkable
class MemoryLoss(Protocol):
    """A loss of a batch against the queue, its own rows left out, or, without a queue, in the batch."""

    def __call__(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int64[Tensor, "B"],
        queue: FeatureQueue | None = None,
        self_indices: Int64[Tensor, "B"] | None = None,
    ) -> Float[Tensor, ""]: ...


class MetricLearning(Method):
    """One encoder, unit embeddings, and a memory of them.

    A step is: embed, adapt the memory to the batch, enqueue the batch, loss of the batch against the memory with each
    anchor's own row left out (the paper's Algorithm, with XBM's union of memory and batch).

    Args:
        encoder: maps images [B, C, S, S] to embeddings [B, D], which are L2-normalised here.
        queue: a FeatureQueue with labels; None: the loss is that of the batch (the paper's No-XBM).
        loss: how pairs are scored.
        batch_loss_weight: weight of the loss in the batch beside that against the memory; 1 makes XBM into XBM*.
        memory_start: steps in which the memory fills but the loss is that of the batch.
    """

    def __init__(
        self,
        encoder: Encoder,
        queue: FeatureQueue | None,
        loss: MemoryLoss,
        *,
        batch_loss_weight: float = 0.0,
        memory_start: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.queue = queue
        self.loss = loss
        self.batch_loss_weight, self.memory_start = batch_loss_weight, memory_start

    @classmethod
    def from_config(cls, config: Config, encoder: Encoder, images: int) -> MetricLearning:
        """Return the method with the config's settings, for a training set of so many images."""
        assert isinstance(config, SuperviseConfig)
        return cls(
            encoder,
            queue_from_config(config, images),
            make_loss(config),
            batch_loss_weight=config.batch_loss_weight,
            memory_start=config.memory_start,
        )

    def forward(
        self, views: tuple[Float[Tensor, "b C S S"], ...], labels: Int64[Tensor, "B"], step: int = 0, steps: int = 1
    ) -> Float[Tensor, ""]:
        """The loss of a step; moves the queue. Only the first view is used."""
        z = gather(self.encoder(views[0]), len(labels))
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        if self.queue is None:
            return self.loss(z, labels)
        self.queue.adapt(z)
        slots = self.queue.enqueue(z, labels)
        if step < self.memory_start:
            return self.loss(z, labels)
        loss = self.loss(z, labels, self.queue, slots)
        if self.batch_loss_weight:
            loss = loss + self.batch_loss_weight * self.loss(z, labels)
        return loss

    def head_loss(self, views: tuple[Float[Tensor, "b C S S"], ...], labels: Int64[Tensor, "B"]) -> Float[Tensor, ""]:
        """Plain SupCon in the batch, for the stage in which the head alone is trained; the backbone stays as it is."""
        self.encoder.backbone.eval()
        with torch.no_grad():
            features = self.encoder.features(views[0])
        self.encoder.backbone.train()
        return sup_con(gather(self.encoder.head(features), len(labels)), labels)


class SupCon:
    """The project's own supervised contrastive loss: blockwise over the queue (``losses.sup_con``)."""

    def __init__(self, temperature: float, miner: PairMargin | None) -> None:
        self.temperature, self.miner = temperature, miner

    def __call__(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int64[Tensor, "B"],
        queue: FeatureQueue | None = None,
        self_indices: Int64[Tensor, "B"] | None = None,
    ) -> Float[Tensor, ""]:
        return sup_con(
            embeddings, labels, queue, temperature=self.temperature, miner=self.miner, self_indices=self_indices
        )


def make_loss(config: SuperviseConfig) -> MemoryLoss:
    """Return the loss that the config names: the project's own where it has one, else pytorch-metric-learning's.

    Raises:
        UserError: no such loss or miner, or arguments that it does not take.
    """
    own_miners = {"none", "PairMarginMiner"}
    miner_args = parse_arguments(config.miner_args, "--miner-args")
    if config.loss == "SupConLoss" and config.miner in own_miners:
        loss_args = parse_arguments(config.loss_args, "--loss-args")
        temperature = _positive(loss_args.pop("temperature", config.temperature), "--loss-args: temperature")
        margins = {
            "positive": _positive(miner_args.pop("pos_margin", 0.2), "--miner-args: pos_margin"),
            "negative": _positive(miner_args.pop("neg_margin", 0.8), "--miner-args: neg_margin"),
        }
        if left := [*loss_args, *(miner_args if config.miner != "none" else ())]:
            raise UserError(
                f"{config.loss} with {config.miner} takes temperature, pos_margin and neg_margin, not {left[0]!r}"
            )
        return SupCon(
            temperature, None if config.miner == "none" else PairMargin(**margins, distance=config.miner_distance)
        )
    from selfsup_xbn.methods.pml_loss import make_pml_loss  # loads pytorch-metric-learning

    miner = "" if config.miner == "none" else config.miner
    return make_pml_loss(config.loss, parse_arguments(config.loss_args, "--loss-args"), miner, miner_args)


def _positive(value: Any, option: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{option}: expected a number above 0, got {value!r}")
    return float(value)
