"""CrossBatchMemory of PyTorch Metric Learning (PML 2), on a queue that is adapted at each step.

Takes the place of ``pytorch_metric_learning.losses.CrossBatchMemory``; a program changes its import.

Axis legend: B batch, E rows to enqueue, A anchors, M queue rows, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64, Shaped
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import CrossBatchMemory as PeersCrossBatchMemory
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from pytorch_metric_learning.miners import PairMarginMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from selfsup_xbn import losses
from selfsup_xbn.adaptation import Adaptation
from selfsup_xbn.errors import UserError
from selfsup_xbn.feature_queue import FeatureQueue


class CrossBatchMemory(PeersCrossBatchMemory):
    """A PML loss of a batch against a queue of past embeddings, the batch among them.

    Each call moves the queue to the moments of the embeddings that enter it, enqueues them, and gives the loss of the
    anchors against the queue. Embeddings are taken as they come: for the moments of unit vectors, which the paper
    matches, normalise them before. With ``adaptation="xbm"`` losses and gradients are PML's, its faults apart: all
    state is in ``state_dict()``, no embedding ever meets itself, a call that enqueues nothing changes nothing, more
    than M embeddings leave the last M, half precision works, and under DistributedLossWrapper all ranks have the rows
    in the same order.

    SupConLoss and NTXentLoss as PML makes them by default, without a miner or with PairMarginMiner, are computed block
    by block: memory and time are O(B M). Anything else is computed by PML, as is all that collects statistics.

    Args:
        loss: one of ``supported_losses()``.
        embedding_size: D.
        memory_size: M.
        miner: PML miner of pairs or triplets between the batch and the queue.
        adaptation: ``"xbm"``, ``"xbn"``, ``"axbn"`` or an instance such as ``AXBN(r=1.0)``.
        **kwargs: those of PML's class (``collect_stats``).

    Raises:
        UserError: an adaptation or a size that cannot be.
    """

    def __init__(
        self,
        loss: nn.Module,
        embedding_size: int,
        memory_size: int = 1024,
        miner: nn.Module | None = None,
        adaptation: str | Adaptation = "xbn",
        **kwargs: Any,
    ) -> None:
        super(PeersCrossBatchMemory, self).__init__(loss=loss, **kwargs)  # not the peer's own: it makes its own queue
        self.loss, self.miner = loss, miner
        self.embedding_size, self.memory_size = embedding_size, memory_size
        self.queue = FeatureQueue(memory_size, embedding_size, adaptation, labels=True)
        self.curr_batch_idx = torch.zeros(0, dtype=torch.int64)
        self.add_to_recordable_attributes(list_of_names=["embedding_size", "memory_size", "queue_idx"], is_stat=False)

    def forward(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Shaped[Tensor, "B"],
        indices_tuple: tuple[Tensor, ...] | None = None,
        enqueue_mask: Bool[Tensor, "B"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch, which enters the queue before.

        Args:
            embeddings: any floating point type; float64 makes the queue float64, others leave it float32.
            labels: integers, or floats that are whole.
            indices_tuple: pairs or triplets (anchor in the batch, slots of the queue) to add to the mined ones.
            enqueue_mask: True for the rows that enter the queue; the others are the anchors. None: each row is both.

        Raises:
            ValueError: both of ``indices_tuple`` and ``enqueue_mask``, or shapes that do not fit.
            UserError: labels that are no whole numbers.
        """
        if indices_tuple is not None and enqueue_mask is not None:
            raise ValueError("indices_tuple and enqueue_mask are mutually exclusive")
        if enqueue_mask is not None and len(enqueue_mask) != len(embeddings):
            raise ValueError(f"expected an enqueue_mask of {len(embeddings)} rows, got {len(enqueue_mask)}")
        self.reset_stats()
        labels = _whole(_beside(labels, embeddings))
        order = _rank_order(embeddings)
        if enqueue_mask is None:
            slots = torch.empty_like(order)
            slots[order] = self._enter(embeddings[order], labels[order])
            return self._loss(embeddings, labels, slots, indices_tuple)
        enqueue_mask = _beside... 
