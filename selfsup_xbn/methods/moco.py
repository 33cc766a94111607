"""MoCo (He et al., arXiv 1911.05722) with a queue that is adapted at each step (arXiv 2303.17127, Sec. 5.3).

Axis legend: B batch, b shard of the batch on this rank, C channels, S side of an image, D dimensions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from selfsup_xbn.config.modes import PretrainConfig
from selfsup_xbn.config.schema import Config
from selfsup_xbn.losses import info_nce
from selfsup_xbn.memory.device import is_capturing
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.sharding import ShardedQueue
from selfsup_xbn.methods.base import Method, MicroBatch, queue_from_config
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.utils.distributed import from_first, gather, shard_slice, shuffle, sum_of_shares, world


class MoCo(Method):
    """Momentum contrast: a query encoder, a key encoder that is its moving average, and a queue of past keys.

    Args:
        encoder: query encoder, which maps images [B, C, S, S] to embeddings [B, D] of any norm. The key encoder is
            initialized as its copy.
        queue: FeatureQueue of D dimensions.
        temperature: temperature T of InfoNCE, above 0.
        momentum: momentum m of the key encoder. At each step its parameters become ``m * key + (1 - m) * query``. Its
            buffers, such as running statistics, are not averaged.
        momentum_schedule: ``"constant"``, or ``"cosine"`` to increase the momentum from m to 1 over the run (BYOL,
            arXiv 2006.07733).
        enqueue: ``"before_loss"`` to enqueue the keys before the loss, so that the other keys of the batch are
            negatives (arXiv 2303.17127); ``"after_loss"`` to enqueue them after it (arXiv 1911.05722). The queue is
            then empty at the first step, whose loss and gradient are 0; the official MoCo fills it with random rows.
        normalize_first: whether keys are L2-normalized before the queue is adapted to them and takes them. The loss
            uses cosine similarities in both cases.
        symmetric: whether both views serve as queries and as keys. The queue then takes 2 B keys a step.

    Attributes:
        ema_weight: 1 - m of a scheduled momentum on CUDA, in a tensor so that a CUDA graph reads it at each replay.

    Example:
        >>> from selfsup_xbn.memory import FeatureQueue
        >>> from selfsup_xbn.models.encoder import build_encoder
        >>> moco = MoCo(build_encoder("convnet4", 128), FeatureQueue(4096, 128, "xbn"))
        >>> views = torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32)
        >>> loss = moco(views, torch.zeros(8, dtype=torch.int64))
        >>> loss.backward()
        >>> len(moco.queue)
        8
    """

    encoder_name = "encoder_q"
    queue_takes_whole_batch = True
    queue: FeatureQueue
    ema_weight: Tensor

    def __init__(
        self,
        encoder: Encoder,
        queue: FeatureQueue,
        *,
        temperature: float = 0.1,
        momentum: float = 0.99,
        momentum_schedule: str = "constant",
        enqueue: str = "before_loss",
        normalize_first: bool = True,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.queue = queue
        self.temperature, self.momentum, self.momentum_schedule = temperature, momentum, momentum_schedule
        self.enqueue, self.normalize_first, self.symmetric = enqueue, normalize_first, symmetric
        self.register_buffer("ema_weight", torch.tensor(1.0 - momentum), persistent=False)

    @classmethod
    def from_config(cls, config: Config, encoder: Encoder, images: int) -> MoCo:
        """Return MoCo with the settings of a config.

        Args:
            config: a ``PretrainConfig``.
            encoder: query encoder.
            images: number of training images, of which the queue size may be a percentage.
        """
        assert isinstance(config, PretrainConfig)
        queue = queue_from_config(config, images)
        assert queue is not None
        return cls(
            encoder,
            queue,
            temperature=config.temperature,
            momentum=config.momentum,
            momentum_schedule=config.momentum_schedule,
            enqueue=config.enqueue,
            normalize_first=config.normalize_first,
            symmetric=config.symmetric,
        )

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        """The query encoder, which is evaluated and exported."""
        return self.encoder_q

    @property
    def capturable(self) -> bool:
        """True: nothing but the momentum changes from step to step."""
        return True

    def update_schedules(self, step: int, steps: int) -> None:
        """Set ``ema_weight`` to that of a step, if the momentum is scheduled."""
        if self.momentum_schedule != "constant":
            self.ema_weight.fill_(1 - self.momentum_at(step / steps))

    def forward(
        self, views: tuple[Float[Tensor, "b C S S"], ...], labels: Int64[Tensor, "B"], step: int = 0, steps: int = 1
    ) -> Float[Tensor, ""]:
        """Return the loss of a step, and update the key encoder and the queue.

        Args:
            views: views of the queries and of the keys, of this rank's shard of the batch.
            labels: labels of the whole batch. Only their number B is used.
            step: number of steps before this one, for the momentum schedule.
            steps: number of steps of the run.
        """
        view_q, view_k = views
        B = len(labels)
        q = self.encoder_q(view_q)
        self._update_key_encoder(step, steps)
        k = self.keys(view_k, B)
        if not self.symmetric:
            return self.contrast([(q, k)])
        return self.contrast([(q, k), (self.encoder_q(view_k), self.keys(view_q, B))])

    def contrast(self, pairs: list[tuple[Float[Tensor, "b D"], Float[Tensor, "B D"]]]) -> Float[Tensor, ""]:
        """Return the mean InfoNCE of several pairs of queries and keys, and adapt and extend the queue.

        Args:
            pairs: queries of this rank's shard of the batch, and keys of the whole batch, in the same order of images.
        """
        keys = torch.cat([k for _, k in pairs])
        self_indices = self._take(keys, len(pairs))
        loss = self._mean_loss(pairs, self_indices)
        if self.enqueue == "after_loss":
            self.queue.enqueue(keys)
        return loss

    def losses(self, parts: list[MicroBatch], step: int, steps: int) -> Iterator[Float[Tensor, ""]]:
        """Yield the loss of each micro-batch of a step, divided by their number.

        The keys of the whole batch are computed first, without gradient, and the queue is adapted to them and takes
        them at once, as without micro-batches.

        Args:
            parts: micro-batches of equal size.
            step: number of steps before this one, for the momentum schedule.
            steps: number of steps of the run.
        """
        self._update_key_encoder(step, steps)
        roles = [(0, 1), (1, 0)] if self.symmetric else [(0, 1)]  # views of the queries and of the keys
        keys = [[self.keys(views[key], len(labels)) for views, labels in parts] for _, key in roles]
        batch = torch.cat([k for part_keys in keys for k in part_keys])
        self_indices = self._take(batch, len(roles))
        part_indices = [None] * len(parts) if self_indices is None else self_indices.chunk(len(parts))
        for number, (views, _) in enumerate(parts):
            pairs = [(self.encoder_q(views[query]), keys[i][number]) for i, (query, _) in enumerate(roles)]
            loss = self._mean_loss(pairs, part_indices[number]) / len(parts)
            if self.enqueue == "after_loss" and number == len(parts) - 1:
                self.queue.enqueue(batch)
            yield loss

    def _take(self, keys: Float[Tensor, "K D"], views: int) -> Int64[Tensor, "B views"] | None:
        """Adapt the queue and, for ``"before_loss"``, enqueue the keys; return the slots of the keys of each image."""
        self.queue.adapt(keys)
        if self.enqueue == "after_loss":
            return None
        # No key of an image is a negative of the same image.
        return torch.stack(self.queue.enqueue(keys).chunk(views), dim=1)

    def _mean_loss(
        self, pairs: list[tuple[Float[Tensor, "b D"], Float[Tensor, "B D"]]], self_indices: Int64[Tensor, "B E"] | None
    ) -> Float[Tensor, ""]:
        """Return the mean InfoNCE of several pairs of queries of this rank and keys of the whole batch."""
        B = len(pairs[0][1])
        sharded = isinstance(self.queue, ShardedQueue)  # each rank compares all queries with its rows
        own = slice(None) if sharded else shard_slice(B)
        indices = None if self_indices is None else self_indices[own]
        losses = [
            info_nce(gather(q, B) if sharded else q, k[own], self.queue, self.temperature, indices) for q, k in pairs
        ]
        loss = torch.stack(losses).mean()
        return loss if sharded or world() == 1 else sum_of_shares(loss * (len(pairs[0][0]) / B))

    @torch.no_grad()
    def keys(self, view: Float[Tensor, "b C S S"], batch_size: int) -> Float[Tensor, "B D"]:
        """Return the keys of a view, embedded in shuffled order (Sec. 3.3 of arXiv 1911.05722).

        Shuffling prevents BatchNorm statistics from revealing which key belongs to a query. In distributed training
        the whole batch is shuffled across the ranks, and each image is sent to the one rank that embeds it.

        Args:
            view: images of this rank's shard of the batch.
            batch_size: number of images B of the whole batch.
        """
        # Several ranks need the order on the host, which plans the exchange.
        order = from_first(torch.randperm(batch_size, device=view.device if world() == 1 else "cpu"))
        k = self.encoder_k(shuffle(view, order))
        k = gather(k, batch_size)
        k = torch.empty_like(k).index_copy_(0, order.to(k.device), k)
        k = k.to(torch.promote_types(k.dtype, torch.float32))  # bfloat16 under autocast
        return F.normalize(k, dim=1) if self.normalize_first else k

    @torch.no_grad()
    def update_key_encoder(self, momentum: float | None = None) -> None:
        """Set ``key <- m * key + (1 - m) * query`` for all parameters (Eq. 2 of arXiv 1911.05722).

        Args:
            momentum: m, from 0 to 1. None for that of ``ema_weight``.
        """
        key: list[Tensor] = list(self.encoder_k.parameters())
        query: list[Tensor] = list(self.encoder_q.parameters())
        if momentum is not None:
            get_ema_multi_avg_fn(momentum)(key, query, None)
        else:  # torch has no lerp of several tensors by a tensor
            change = torch._foreach_sub(query, key)
            torch._foreach_mul_(change, self.ema_weight)
            torch._foreach_add_(key, change)

    def _update_key_encoder(self, step: int, steps: int) -> None:
        """Update the key encoder with the momentum of a step."""
        if self.momentum_schedule == "constant" or not self.ema_weight.is_cuda:
            self.update_key_encoder(self.momentum_at(step / steps))
            return
        if not is_capturing(self.ema_weight):
            self.update_schedules(step, steps)
        self.update_key_encoder()

    def momentum_at(self, progress: float) -> float:
        """Return the momentum m at a fraction of the run, from 0 to 1."""
        if self.momentum_schedule == "constant":
            return self.momentum
        return 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2
