"""MoCo (He et al., arXiv 1911.05722) whose queue is adapted at each step (arXiv 2303.17127, Sec. 5.3).

Axis legend: B batch, b this process's shard of it, C channels, S side of an image, D dimensions.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from selfsup_xbn.config.schema import Config, PretrainConfig
from selfsup_xbn.losses import info_nce
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.methods.base import Method, queue_from_config
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.utils.distributed import from_first, gather, shard_slice


class MoCo(Method):
    """Query encoder, key encoder that follows it, and the queue of keys.

    Args:
        encoder: the query encoder; its embeddings [B, D] may have any length. The key encoder starts as its copy.
        queue: FeatureQueue of D dimensions.
        temperature: T of InfoNCE.
        momentum: m; each step the key encoder's parameters become ``m * key + (1 - m) * query``. Buffers (running
            statistics) are each encoder's own.
        momentum_schedule: ``"constant"``, or ``"cosine"``: from m up to 1 over the run (BYOL, arXiv 2006.07733).
        enqueue: ``"before_loss"``: adapt, enqueue, loss, so that the batch's keys are negatives of one another (the
            paper); ``"after_loss"``: adapt, loss, enqueue (classic MoCo).
        normalize_first: whether keys are L2-normalised before their moments are matched and they are enqueued, or
            matched and enqueued as the encoder gives them. Similarities are cosines in either case.
        symmetric: both views are queries and keys; the queue takes both sets of keys, once a step.
    """

    encoder_name = "encoder_q"
    queue: FeatureQueue

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

    @classmethod
    def from_config(cls, config: Config, encoder: Encoder, images: int) -> MoCo:
        """Return MoCo with the config's settings, for a training set of so many images."""
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
        """Whether the momentum is constant: a graph would freeze it."""
        return self.momentum_schedule == "constant"

    def forward(
        self, views: tuple[Float[Tensor, "b C S S"], ...], labels: Int64[Tensor, "B"], step: int = 0, steps: int = 1
    ) -> Float[Tensor, ""]:
        """The loss of a step; moves the key encoder and the queue.

        Args:
            views: two random views of each image: queries, keys; of this process's shard of the batch.
            labels: those of the whole batch, of which only the number is used.
            step, steps: position in the run, for the momentum schedule.
        """
        view_q, view_k = views
        B = len(labels)
        q = gather(self.encoder_q(view_q), B)
        self.update_key_encoder(self.momentum_at(step / steps))
        k = self.keys(view_k, B)
        if not self.symmetric:
            return self.contrast([(q, k)])
        return self.contrast([(q, k), (gather(self.encoder_q(view_k), B), self.keys(view_q, B))])

    def contrast(self, pairs: list[tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]]) -> Float[Tensor, ""]:
        """Return InfoNCE of each (queries, keys) against the queue, the mean over the pairs, and enqueue the keys."""
        keys = torch.cat([k for _, k in pairs])
        self.queue.adapt(keys)
        own = None
        if self.enqueue == "before_loss":
            # An image meets none of its own keys as a negative: [B, pairs] slots.
            own = torch.stack(self.queue.enqueue(keys).chunk(len(pairs)), dim=1)
        loss = torch.stack([info_nce(q, k, self.queue, self.temperature, own) for q, k in pairs]).mean()
        if self.enqueue == "after_loss":
            self.queue.enqueue(keys)
        return loss

    @torch.no_grad()
    def keys(self, view: Float[Tensor, "b C S S"], batch_size: int) -> Float[Tensor, "B D"]:
        """Keys of a view, embedded in shuffled order so that BatchNorm's splits do not tell which query is whose.

        Several processes shuffle the whole batch among them, as MoCo does: each embeds images of all.
        """
        order = from_first(torch.randperm(batch_size, device=view.device))
        k = self.encoder_k(gather(view, batch_size)[order[shard_slice(batch_size)]])
        k = gather(k, batch_size)[order.argsort()]
        k = k.to(torch.promote_types(k.dtype, torch.float32))  # bfloat16 under autocast
        return F.normalize(k, dim=1) if self.normalize_first else k

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """``key <- m * key + (1 - m) * query`` for all parameters at once (Eq. 2 of arXiv 1911.05722)."""
        key, query = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        get_ema_multi_avg_fn(momentum)(key, query, None)

    def momentum_at(self, progress: float) -> float:
        """M at a fraction of the run."""
        if self.momentum_schedule == "constant":
            return self.momentum
        return 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2
