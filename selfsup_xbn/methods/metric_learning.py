"""Supervised metric learning with a cross-batch memory: XBM (arXiv 1912.06798), XBN and AXBN (arXiv 2303.17127).

Axis legend: B batch, b shard of the batch on this rank, C channels, S side of an image, D dimensions.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.config.parsing import parse_arguments
from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import UserError, one_line
from selfsup_xbn.losses import PairMargin, sup_con
from selfsup_xbn.losses.functional import unit_rows
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.following import check_follows
from selfsup_xbn.memory.sharding import ShardedQueue
from selfsup_xbn.methods.base import Method, queue_from_config
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.utils.distributed import all_sum, gather, shard_slice, sum_gradient, sum_of_shares, world
from selfsup_xbn.utils.labels import class_indices


@runtime_checkable
class MemoryLoss(Protocol):
    """Loss of the pairs of a batch with the rows of a queue or, without a queue, within the batch.

    In distributed training every process calls it with the whole batch and gets the loss of the whole batch. Gradient
    has to flow to the rows of the process itself only (``shard_slice``).
    """

    def __call__(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int64[Tensor, "B"],
        queue: FeatureQueue | None = None,
        self_indices: Int64[Tensor, "B"] | None = None,
        *,
        adapted_to: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss.

        Args:
            embeddings: unit embeddings of the batch, the anchors.
            labels: class of each anchor.
            queue: the queue with labels; None for pairs within the batch.
            self_indices: slot of each anchor in the queue, which is excluded from its pairs.
            adapted_to: the batch, for the gradient of rows that follow it (``memory.following``); None for constants.
        """
        ...


class MetricLearning(Method):
    """Supervised metric learning with an encoder and a queue of its past embeddings (arXiv 2303.17127).

    A step embeds the batch, adapts the queue to it, enqueues it, and returns the loss of the batch against the queue,
    where the row of each anchor itself is excluded.

    Args:
        encoder: module that maps images [B, C, S, S] to embeddings [B, D], which are L2-normalized by the method.
        queue: FeatureQueue with labels. With None the loss is computed within the batch ("No-XBM" in the paper).
        loss: loss of the pairs. If it is a module, its parameters are trained and saved too.
        batch_loss_weight: weight of an additional loss within the batch. With 1, XBM becomes XBM*.
        memory_start: number of first steps whose loss is computed within the batch while the queue fills.
        moment_gradient: add the gradient by the moments of the batch, with which XBN moves the rows of the queue.

    Raises:
        UserError: ``moment_gradient`` with a queue whose rows do not follow the batch.

    Example:
        >>> from selfsup_xbn.memory import FeatureQueue
        >>> from selfsup_xbn.models.encoder import build_encoder
        >>> encoder = build_encoder("convnet-digits", 64, channels=1, image_size=8)
        >>> method = MetricLearning(encoder, FeatureQueue(256, 64, "xbn", labels=True), SupCon(0.1, PairMargin()))
        >>> images, labels = torch.rand(16, 1, 8, 8), torch.arange(4).repeat(4)
        >>> loss = method((images,), labels)
        >>> loss.backward()
        >>> len(method.queue)
        16
    """

    def __init__(
        self,
        encoder: Encoder,
        queue: FeatureQueue | None,
        loss: MemoryLoss,
        *,
        batch_loss_weight: float = 0.0,
        memory_start: int = 0,
        moment_gradient: bool = False,
    ) -> None:
        super().__init__()
        if moment_gradient and queue is not None:
            check_follows(queue)
        self.encoder, self.queue, self.loss, self.moment_gradient = encoder, queue, loss, moment_gradient
        self.batch_loss_weight, self.memory_start = batch_loss_weight, memory_start
        if isinstance(loss, nn.Module):
            for parameter in loss.parameters():
                # Every process computes the loss of the whole batch, and gradients are summed over the processes.
                parameter.register_hook(lambda gradient: gradient / world())

    @classmethod
    def from_config(cls, config: Config, encoder: Encoder, images: int) -> MetricLearning:
        """Return the method with the settings of a config.

        Args:
            config: a ``SuperviseConfig``.
            encoder: encoder to train.
            images: number of training images, of which the queue size may be a percentage.

        Raises:
            UserError: the loss or the miner is unknown, does not accept its arguments, or needs a queue that is not
                sharded.
        """
        assert isinstance(config, SuperviseConfig)
        queue, loss = queue_from_config(config, images), make_loss(config)
        if isinstance(queue, ShardedQueue) and not isinstance(loss, SupCon):
            raise UserError(
                f"--shard-queue: expected --loss SupConLoss and --miner PairMarginMiner or none, got {config.loss} and "
                f"{config.miner}, which need all rows of the queue in one process"
            )
        return cls(
            encoder,
            queue,
            loss,
            batch_loss_weight=config.batch_loss_weight,
            memory_start=config.memory_start,
            moment_gradient=config.moment_gradient,
        )

    @property
    def capturable(self) -> bool:
        """Whether all steps are alike and wait for nothing, which is known of the loss of this package."""
        return isinstance(self.loss, SupCon) and self.memory_start == 0

    def forward(
        self, views: tuple[Float[Tensor, "b C S S"], ...], labels: Int64[Tensor, "B"], step: int = 0, steps: int = 1
    ) -> Float[Tensor, ""]:
        """Return the loss of a step, and adapt and extend the queue.

        Args:
            views: views of this rank's shard of the batch. Only the first one is used.
            labels: class of each image of the whole batch.
            step: number of steps before this one.
            steps: number of steps of the run; not used.
        """
        labels = class_indices(labels, len(labels))
        z = unit_rows(gather(self.encoder(views[0]), len(labels)))
        if len(z) != len(labels):
            raise ValueError(f"expected one label for each of {len(z)} images, got {len(labels)}")
        if self.queue is None:
            return self.loss(z, labels)
        self.queue.adapt(z)
        slots = self.queue.enqueue(z, labels)
        if step < self.memory_start:
            return self.loss(z, labels)
        following = {"adapted_to": z} if self.moment_gradient else {}
        loss = self.loss(z, labels, self.queue, slots, **following)
        if self.batch_loss_weight:
            loss = loss + self.batch_loss_weight * self.loss(z, labels)
        return loss

    def try_loss(self, classes: int) -> None:
        """Compute the loss of a small batch on a copy, without effect on the method or on random numbers.

        Args:
            classes: number of training classes.

        Raises:
            UserError: the loss or its miner raises an exception, or its value is not a finite number.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            labels = torch.tensor([0, 0, 0, 0, *[max(classes - 1, 1)] * 4])
            queue = FeatureQueue(3 * len(labels), self.encoder.dim, "xbm", labels=True)
            for spread in (0.4, 10.0):  # distances of about 0.5, at which miners select pairs, and of 1.4
                rows = torch.randn(queue.size, self.encoder.dim) * spread + 1
                for z in F.normalize(rows, dim=1).split(len(labels)):  # more rows than anchors, as in training
                    slots = queue.enqueue(z, labels)
                if self.queue is None or self.memory_start or self.batch_loss_weight:
                    self._try_batch(z, labels)
                if self.queue is not None:
                    self._try_batch(z, labels, queue, slots)

    def _try_batch(self, z: Tensor, *arguments: Any) -> None:
        try:
            loss = copy.deepcopy(self.loss)
            value = (loss.cpu() if isinstance(loss, nn.Module) else loss)(z.clone().requires_grad_(), *arguments)
            value.backward()
        except Exception as error:  # losses of the library and of users raise exceptions of many types
            raise UserError(f"--loss: the loss of a trial batch failed: {one_line(error)}") from error
        if value.shape != () or not value.isfinite():
            raise UserError(f"--loss: expected a finite loss of a trial batch, got {value.tolist()}")

    def head_loss(self, views: tuple[Float[Tensor, "b C S S"], ...], labels: Int64[Tensor, "B"]) -> Float[Tensor, ""]:
        """Return the SupCon loss within the batch. Gradient flows to the head only, and the backbone does not change.

        Args:
            views: views of this rank's shard of the batch. Only the first one is used.
            labels: class of each image of the whole batch.
        """
        self.encoder.backbone.eval()
        with torch.no_grad():
            features = self.encoder.features(views[0])
        self.encoder.train()
        return sup_con(gather(self.encoder.head(features), len(labels)), labels)

    def notes(self) -> list[str]:
        """Return a note on a loss that several processes do not share out."""
        if world() == 1 or self.queue is None or isinstance(self.loss, SupCon):
            return []
        return [
            f"note: each of the {world()} processes scores the whole batch, as losses and miners of "
            "pytorch-metric-learning require; SupConLoss with PairMarginMiner is shared out among the processes"
        ]


class SupCon:
    """Supervised contrastive loss, computed blockwise over the queue (``losses.sup_con``).

    In distributed training each process scores its shard of the batch against the queue, or the whole batch against
    its shard of the queue. The loss within a batch is computed by every process for the whole batch.

    Args:
        temperature: temperature of the logits, above 0.
        miner: margins of the pairs that count; None counts all pairs.
    """

    def __init__(self, temperature: float, miner: PairMargin | None) -> None:
        self.temperature, self.miner = temperature, miner

    def __call__(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int64[Tensor, "B"],
        queue: FeatureQueue | None = None,
        self_indices: Int64[Tensor, "B"] | None = None,
        *,
        adapted_to: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss. The arguments are those of ``MemoryLoss``."""
        shared_out = queue is not None and not isinstance(queue, ShardedQueue)
        own = shard_slice(len(labels)) if shared_out else slice(None)
        loss = sup_con(
            embeddings[own],
            labels[own],
            queue,
            temperature=self.temperature,
            miner=self.miner,
            self_indices=None if self_indices is None else self_indices[own],
            adapted_to=None if adapted_to is None else sum_gradient(adapted_to),  # each process has part of the loss
            sum_counts=all_sum if shared_out and world() > 1 else None,  # without it the Triton kernels serve
        )
        return sum_of_shares(loss) if shared_out else loss


def make_loss(config: SuperviseConfig) -> MemoryLoss:
    """Return the loss of a config.

    SupConLoss without a miner or with PairMarginMiner is computed blockwise by this package. All other losses and
    miners are those of pytorch-metric-learning.

    Raises:
        UserError: the loss or the miner is unknown, or does not accept its arguments.
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
        if unknown := [*loss_args, *(miner_args if config.miner != "none" else ())]:
            raise UserError(
                f"{config.loss} with {config.miner}: expected temperature, pos_margin or neg_margin, got {unknown[0]!r}"
            )
        return SupCon(
            temperature, None if config.miner == "none" else PairMargin(**margins, distance=config.miner_distance)
        )
    from selfsup_xbn.methods.pml_loss import make_pml_loss  # imports pytorch-metric-learning

    miner = "" if config.miner == "none" else config.miner
    return make_pml_loss(config.loss, parse_arguments(config.loss_args, "--loss-args"), miner, miner_args)


def _positive(value: Any, option: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{option}: expected a number above 0, got {value!r}")
    return float(value)
