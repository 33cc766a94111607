"""CrossBatchMemory of PyTorch Metric Learning (PML) with an adapted queue.

The interface and the order of a step are those of PML 2.9: the queue is adapted to the new embeddings, they are
enqueued, and the loss of the batch is computed against the queue without pairs of an embedding with itself. With
``adaptation="xbm"`` the values equal PML's. Differences from PML: the ``state_dict`` contains the pointer and the
number of filled rows; a batch of one embedding has no pair with itself, and no miner selects an embedding as its own
positive; an ``enqueue_mask`` may be False or True everywhere or select more than M rows; half precision is supported;
all ranks store the rows in the same order.

**Implementation of the loss.** SupConLoss and NTXentLoss with default settings, without a miner or with
PairMarginMiner, are computed blockwise (``selfsup_xbn.losses``) in O(B D + B b) memory for blocks of b rows. PML
computes all other losses, miners, distances and reducers on the adapted rows, and all losses with an ``indices_tuple``,
``collect_stats=True``, a temperature that is a tensor, hooks, or methods that a subclass or an instance replaces.

**State.** A ``state_dict`` of PML's class loads: its rows are taken over. PML does not save the pointer, so rows of
zeros at the end count as empty, and a full memory continues at slot 0. ``embedding_memory``, ``label_memory``,
``queue_idx`` and ``has_been_filled`` can be assigned. A change of ``embedding_memory`` in place raises an error, except
with ``adaptation="xbm"``.

**Precision.** Losses are computed in float32 or float64, also for half precision inputs and under autocast. The queue
is stored in float32, and in float64 after the first float64 embeddings.

**Gradient accumulation.** Each call adapts the queue to its embeddings and enqueues them: in a loop of K micro-batches,
to the moments of each micro-batch. The embeddings of a step come from the same weights.

Axis legend: B batch, E rows that enter the queue, n filled rows, M queue rows, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from pytorch_metric_learning.losses.cross_batch_memory import CrossBatchMemory as PeerMemory
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from selfsup_xbn.errors import UserError
from selfsup_xbn.integrations._pml_blockwise import blockwise_loss
from selfsup_xbn.integrations._pml_state import MemoryState
from selfsup_xbn.integrations.pml_mining import mine_without_self
from selfsup_xbn.losses.functional import check_temperature
from selfsup_xbn.memory.adaptation import Adaptation
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.following import check_follows, features
from selfsup_xbn.utils.checks import check_tensors, whole_numbers
from selfsup_xbn.utils.distributed import rank, world
from selfsup_xbn.utils.labels import class_indices


class CrossBatchMemory(MemoryState, PeerMemory):
    """Cross-batch memory of M adapted rows, a replacement for ``pytorch_metric_learning.losses.CrossBatchMemory``.

    Of more than M new embeddings, the last M are enqueued. A batch with a non-finite value is not enqueued. With PML's
    DistributedLossWrapper all ranks store the same rows in the same order. If the loss is computed blockwise, the host
    does not wait for the device, except for an ``enqueue_mask`` on the device.

    Embeddings are stored without normalization. Normalize them first to match the moments of unit vectors, as in the
    paper (arXiv 2303.17127).

    Args:
        loss: a loss of ``supported_losses()``.
        embedding_size: number of dimensions D.
        memory_size: number of rows M.
        miner: a PML miner of the pairs or triplets of the batch with the queue.
        adaptation: ``"xbm"``, ``"xbn"``, ``"axbn"`` or an instance such as ``AXBN(r=1.0)``.
        implementation: ``"auto"``, ``"blockwise"`` or ``"dense"``, as in ``selfsup_xbn.losses``. A second derivative
            needs ``"dense"``.
        moment_gradient: add the gradient by the moments of the embeddings, with which XBN moves the rows.
        **kwargs: further arguments of PML's class, such as ``collect_stats``.

    Raises:
        UserError: a size is not a whole number of at least 1, the adaptation is unknown, the loss has a temperature
            that is not above 0 and finite, or ``moment_gradient`` with an adaptation other than "xbn" or in a subclass
            with an ``embedding_memory`` of its own.
        Exception: raised by PML for a loss that is not supported.

    Example:
        >>> from pytorch_metric_learning.losses import SupConLoss
        >>> memory = CrossBatchMemory(SupConLoss(), embedding_size=16, memory_size=256)
        >>> embeddings = torch.randn(8, 16, requires_grad=True)
        >>> loss = memory(embeddings, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
        >>> loss.backward()
        >>> memory.queue_idx
        8
    """

    loss: Any
    miner: Any
    curr_batch_idx: Tensor

    def __init__(
        self,
        loss: nn.Module,
        embedding_size: int,
        memory_size: int = 1024,
        miner: Callable[..., tuple[Tensor, ...]] | None = None,
        adaptation: str | Adaptation = "xbn",
        *,
        implementation: str = "auto",
        moment_gradient: bool = False,
        **kwargs: Any,
    ) -> None:
        # Skips the constructor of PML's class, which allocates another queue.
        super(PeerMemory, self).__init__(loss=loss, **kwargs)
        if isinstance(temperature := getattr(loss, "temperature", None), int | float):
            check_temperature(temperature)
        self.loss, self.miner, self.implementation = loss, miner, implementation
        self.embedding_size, self.memory_size = whole_numbers(embedding_size=embedding_size, memory_size=memory_size)
        self.queue = FeatureQueue(self.memory_size, self.embedding_size, adaptation, labels=True)
        self.moment_gradient = moment_gradient
        if moment_gradient:
            check_follows(self.queue)
            if self._overrides_rows:
                raise UserError("moment_gradient: expected the embedding_memory of CrossBatchMemory, got an override")
        self.curr_batch_idx = torch.zeros(0, dtype=torch.int64)
        self._assigned = None
        self.add_to_recordable_attributes(list_of_names=["embedding_size", "memory_size", "queue_idx"], is_stat=False)

    def forward(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Shaped[Tensor, "B"],
        indices_tuple: tuple[Tensor, ...] | None = None,
        enqueue_mask: Bool[Tensor, "B"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of the batch against the queue, after the embeddings are enqueued.

        Args:
            embeddings: embeddings of any norm, in any floating point dtype.
            labels: class of each embedding. Floating point labels must be whole numbers.
            indices_tuple: pairs (a, p, a, n) or triplets (a, p, n) in addition to the mined ones. The anchors a are
                indices of the batch, p and n are slots of the queue, as in PML: row j of the batch takes slot
                (queue_idx + j) % M, with ``queue_idx`` before the step.
            enqueue_mask: True for the embeddings that are enqueued. The others are the anchors. With None all
                embeddings are enqueued and are anchors.

        Raises:
            ValueError: both ``indices_tuple`` and ``enqueue_mask`` are given, or the shapes or dtypes do not fit.
            UserError: a label is not a whole number.
            RuntimeError: ``torch.utils.checkpoint`` computes the loss a second time.
        """
        _check(embeddings, self.embedding_size, indices_tuple, enqueue_mask)
        labels = class_indices(_to_device_of(labels, embeddings), len(embeddings))
        self.reset_stats()
        enqueued = _in_rank_order(len(embeddings), embeddings.device if enqueue_mask is None else enqueue_mask.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            if enqueue_mask is None:
                first = self.queue.pointer.to(embeddings.device)
                self.add_to_memory(embeddings.detach()[enqueued], labels[enqueued], len(enqueued))
                self.curr_batch_idx = torch.empty_like(enqueued).index_copy_(0, enqueued, self.curr_batch_idx)
                if indices_tuple is not None:
                    indices_tuple = self._in_slots(indices_tuple, first)
                return self._loss(embeddings, labels, indices_tuple, embeddings, is_in_queue=True)
            enqueued = _to_device_of(enqueued[enqueue_mask[enqueued]], embeddings)
            self.add_to_memory(embeddings.detach()[enqueued], labels[enqueued], len(enqueued))
            anchors = _to_device_of(enqueue_mask.logical_not().nonzero()[:, 0], embeddings)
            return self._loss(embeddings[anchors], labels[anchors], None, embeddings[enqueued], is_in_queue=False)

    @torch.no_grad()
    def add_to_memory(self, embeddings: Float[Tensor, "E D"], labels: Shaped[Tensor, "E"], batch_size: int) -> None:
        """Adapt the queue to the embeddings and enqueue them.

        ``curr_batch_idx`` is set to their slots, and to -1 for embeddings that are not enqueued.

        Args:
            embeddings: embeddings of any norm, in any floating point dtype.
            labels: class of each embedding.
            batch_size: number of embeddings E, an argument of PML's interface.
        """
        labels, self._assigned = class_indices(labels, len(embeddings)), None
        if self.queue.rows.device != embeddings.device:
            self.queue.to(embeddings.device)
        if embeddings.dtype == torch.float64:
            self._store_as(torch.float64)
        if len(embeddings) == 0:
            self.curr_batch_idx = torch.zeros(0, dtype=torch.int64, device=embeddings.device)
            return
        self.queue.adapt(embeddings)
        self.curr_batch_idx = self.queue.enqueue(embeddings, labels)

    def create_indices_tuple(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int64[Tensor, "B"],
        E_mem: Float[Tensor, "n D"],
        L_mem: Int64[Tensor, "n"],
        input_indices_tuple: tuple[Tensor, ...] | None,
        do_remove_self_comparisons: bool,
    ) -> tuple[Tensor, ...]:
        """Return the mined pairs or triplets, followed by those of ``input_indices_tuple``.

        Args:
            embeddings: anchors.
            labels: class of each anchor.
            E_mem: adapted rows of the queue.
            L_mem: class of each row.
            input_indices_tuple: pairs or triplets to append; None for none.
            do_remove_self_comparisons: whether to remove pairs of an anchor with its own row at ``curr_batch_idx``.
        """
        if do_remove_self_comparisons:
            mined = mine_without_self(self.miner, embeddings, labels, E_mem, L_mem, self.curr_batch_idx)
        else:
            mined = super().create_indices_tuple(embeddings, labels, E_mem, L_mem, None, False)
        if input_indices_tuple is None:
            return mined
        same_kind = lmu.convert_to_triplets if len(mined) == 3 else lmu.convert_to_pairs
        return c_f.concatenate_indices_tuples(mined, same_kind(input_indices_tuple, labels))

    def reset_queue(self) -> None:
        """Empty the queue and reset its adaptation."""
        self.queue.reset()

    def _in_slots(self, indices_tuple: tuple[Tensor, ...], first: Int64[Tensor, ""]) -> tuple[Tensor, ...]:
        """Return given pairs or triplets with the slots that the batch has, where PML has (first + j) % M for row j.

        They differ under DistributedLossWrapper. Pairs with a row that was not enqueued are dropped.
        """
        if len(self.curr_batch_idx) > self.memory_size:
            return indices_tuple
        anchors, slots = indices_tuple[0], []
        for index in (indices_tuple[1], indices_tuple[-1]):
            row = (index - first) % self.memory_size
            of_batch = row < len(self.curr_batch_idx)
            slots.append(torch.where(of_batch, self.curr_batch_idx[row * of_batch], index))
        positive, negative = slots
        if len(indices_tuple) == 3:
            kept = (positive >= 0) & (negative >= 0)
            return anchors[kept], positive[kept], negative[kept]
        pos, neg = positive >= 0, negative >= 0
        return anchors[pos], positive[pos], indices_tuple[2][neg], negative[neg]

    def _loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
        adapted_to: Tensor | None,
        is_in_queue: bool,
    ) -> Tensor:
        """Return the loss of the anchors against the queue. If they are in it, their slots are ``curr_batch_idx``."""
        adapted_to = adapted_to if self.moment_gradient and len(self.curr_batch_idx) else None
        blockwise = None if indices_tuple is not None else self._blockwise()
        if blockwise is not None:
            own = self.curr_batch_idx if is_in_queue else None
            return blockwise(embeddings, labels, self.queue, self_indices=own, adapted_to=adapted_to)
        filled = len(self.queue)
        embeddings = embeddings.to(torch.promote_types(self.queue.rows.dtype, torch.float32))
        if filled == 0 or len(embeddings) == 0:
            return embeddings.sum() * 0
        rows = self.embedding_memory[:filled] if self._overrides_rows else features(self.queue, adapted_to)
        row_labels = self.label_memory[:filled]
        indices_tuple = self.create_indices_tuple(embeddings, labels, rows, row_labels, indices_tuple, is_in_queue)
        return self.loss(embeddings, labels, indices_tuple, rows, row_labels)

    @property
    def _overrides_rows(self) -> bool:
        """Whether a subclass has an ``embedding_memory`` of its own, whose rows the loss then reads."""
        return type(self).embedding_memory is not CrossBatchMemory.embedding_memory

    def _blockwise(self) -> Callable[..., Tensor] | None:
        """Return the blockwise function that equals the loss and the miner, or None."""
        if any(getattr(module, "collect_stats", False) for module in self.modules()):
            return None
        for name in ("create_indices_tuple", "embedding_memory", "label_memory"):
            if name in vars(self) or getattr(type(self), name) is not getattr(CrossBatchMemory, name):
                return None
        return blockwise_loss(self.loss, self.miner, self._record_pairs, self.implementation)

    def _record_pairs(self, positives: Int64[Tensor, ""], negatives: Int64[Tensor, ""]) -> None:
        """Set the counts that PML's miners record. On CUDA they are tensors, so that the host does not wait."""
        counts = positives, negatives
        self.miner.num_pos_pairs, self.miner.num_neg_pairs = (c if c.is_cuda else int(c) for c in counts)


def _in_rank_order(rows: int, device: torch.device) -> Int64[Tensor, "B"]:
    """Return indices that sort the rows of a gathered batch by rank.

    DistributedLossWrapper puts the rows of this rank first. A batch that was not gathered cannot be distinguished from
    a gathered one, and is enqueued in a different order.
    """
    index = torch.arange(rows, device=device)
    if world() == 1 or rows % world():
        return index
    own, *others = index.chunk(world())
    return torch.cat([*others[: rank()], own, *others[rank() :]])


def _to_device_of(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the tensor on the device of another one. A copy from the CPU is asynchronous."""
    return tensor.to(other.device, non_blocking=tensor.device.type == "cpu")


def _check(embeddings: Tensor, dim: int, indices_tuple: tuple[Tensor, ...] | None, enqueue_mask: Tensor | None) -> None:
    check_tensors(embeddings=embeddings)
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or not embeddings.is_floating_point():
        raise ValueError(
            f"expected floating point embeddings of shape [B, {dim}], got {[*embeddings.shape]} of {embeddings.dtype}"
        )
    if indices_tuple is not None and enqueue_mask is not None:
        raise ValueError("expected indices_tuple or enqueue_mask, got both: they are mutually exclusive")
    if indices_tuple is not None and len(indices_tuple) not in (3, 4):
        raise ValueError(f"expected pairs (a, p, a, n) or triplets (a, p, n), got {len(indices_tuple)} tensors")
    if enqueue_mask is not None and enqueue_mask.shape != embeddings.shape[:1]:
        raise ValueError(f"expected an enqueue_mask of {len(embeddings)} rows, got {[*enqueue_mask.shape]}")
    if enqueue_mask is not None and enqueue_mask.dtype != torch.bool:
        raise ValueError(f"expected a boolean enqueue_mask, got {enqueue_mask.dtype}")
