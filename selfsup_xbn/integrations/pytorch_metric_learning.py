"""PyTorch Metric Learning's CrossBatchMemory on the adapted queue: change the import, and nothing else.

The interface is that of PML 2.9. The order of a step is PML's and the paper's: the queue is adapted to the embeddings
that enter it, they are enqueued, and the loss of the batch is taken against the queue, where no embedding meets itself.
``adaptation="xbm"`` adapts nothing and gives PML's numbers. Mended: pointer and fill are in the ``state_dict``; a batch
of one has no pair with itself; an ``enqueue_mask`` that is all False, or takes more than M rows, does no harm; half
precision works; ranks agree on the order of the rows.

**Two ways to the loss.** SupConLoss and NTXentLoss as PML makes them by default, with no miner or PairMarginMiner, are
computed block by block (``selfsup_xbn.losses``), in memory of O(B D + B b) for blocks of b rows. All else is PML's own
loss and miner on the adapted rows: other losses, miners, distances or reducers, an ``indices_tuple``, and whatever
collects statistics (``collect_stats=True``).

**Precision.** Half precision and autocast end here: losses are at least float32. The queue is float32, and becomes
float64 with the first float64 embeddings.

Axis legend: B batch, E rows that enter the queue, n filled rows, M queue rows, D dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import PairMarginMiner
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from selfsup_xbn.errors import UserError
from selfsup_xbn.losses import PairMargin, nt_xent, sup_con
from selfsup_xbn.memory.adaptation import Adaptation
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.utils.distributed import rank, world

BLOCKWISE = {peer.SupConLoss: sup_con, peer.NTXentLoss: nt_xent}


class CrossBatchMemory(peer.CrossBatchMemory):
    """Takes the place of ``pytorch_metric_learning.losses.CrossBatchMemory``, under its trainers and wrappers too.

    All state is in ``state_dict()``. Any number of rows may enter: of more than M the last M are kept, none change
    nothing, and a batch with a non-finite value is left out. Under DistributedLossWrapper all ranks hold the same rows
    in the same order. No step on the blockwise way waits for the device, unless ``enqueue_mask`` is on it.

    Embeddings are matched and stored as they come. The paper matches the moments of unit vectors: for that, normalise
    embeddings before.

    Args:
        loss: one of ``supported_losses()``.
        embedding_size: D.
        memory_size: M.
        miner: a PML miner, of the pairs or triplets of the batch with the queue.
        adaptation: ``"xbm"``, ``"xbn"``, ``"axbn"`` or an instance such as ``AXBN(r=1.0)``.
        **kwargs: PML's, ``collect_stats``.

    Raises:
        UserError: a size below 1, or an adaptation that does not exist.
        Exception: PML's own, for a loss that is not supported.
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
        **kwargs: Any,
    ) -> None:
        super(peer.CrossBatchMemory, self).__init__(loss=loss, **kwargs)  # past PML's class, which makes its own queue
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
        """The loss of a batch, whose embeddings enter the queue before.

        Args:
            embeddings: of any length, in any precision.
            labels: class of each, in any type of whole numbers.
            indices_tuple: pairs (a, p, a, n) or triplets (a, p, n) to add to the mined ones; a in the batch, p and n
                slots of the queue, as in PML.
            enqueue_mask: True for rows that enter the queue; the others are the anchors. None: each row is both.

        Raises:
            ValueError: both an ``indices_tuple`` and an ``enqueue_mask``, or shapes that do not fit.
            UserError: labels that are no whole numbers.
        """
        if indices_tuple is not None and enqueue_mask is not None:
            raise ValueError("indices_tuple and enqueue_mask are mutually exclusive")
        if enqueue_mask is not None and len(enqueue_mask) != len(embeddings):
            raise ValueError(f"expected an enqueue_mask of {len(embeddings)} rows, got {len(enqueue_mask)}")
        if len(labels) != len(embeddings):
            raise ValueError(f"expected {len(embeddings)} labels, got {len(labels)}")
        self.reset_stats()
        labels = _class_indices(_beside(labels, embeddings))
        entering = _in_rank_order(len(embeddings), embeddings.device if enqueue_mask is None else enqueue_mask.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            if enqueue_mask is None:
                self.add_to_memory(embeddings.detach()[entering], labels[entering], len(entering))
                self.curr_batch_idx = torch.empty_like(entering).index_copy_(0, entering, self.curr_batch_idx)
                return self._loss(embeddings, labels, indices_tuple, is_in_queue=True)
            entering = _beside(entering[enqueue_mask[entering]], embeddings)
            self.add_to_memory(embeddings.detach()[entering], labels[entering], len(entering))
            anchors = _beside(enqueue_mask.logical_not().nonzero()[:, 0], embeddings)
            return self._loss(embeddings[anchors], labels[anchors], None, is_in_queue=False)

    @torch.no_grad()
    def add_to_memory(self, embeddings: Float[Tensor, "E D"], labels: Shaped[Tensor, "E"], batch_size: int) -> None:
        """Adapts the queue to embeddings and enqueues them; ``curr_batch_idx`` becomes their slots, -1 if not kept.

        Args:
            embeddings, labels: as in ``forward``.
            batch_size: E, for PML's sake.
        """
        if self.queue.rows.device != embeddings.device:
            self.queue.to(embeddings.device)
        if embeddings.dtype == torch.float64:
            self._store_as(torch.float64)
        if batch_size == 0:
            self.curr_batch_idx = torch.zeros(0, dtype=torch.int64, device=embeddings.device)
            return
        self.queue.adapt(embeddings)
        self.curr_batch_idx = self.queue.enqueue(embeddings, _class_indices(labels))

    def create_indices_tuple(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int64[Tensor, "B"],
        E_mem: Float[Tensor, "n D"],
        L_mem: Int64[Tensor, "n"],
        input_indices_tuple: tuple[Tensor, ...] | None,
        do_remove_self_comparisons: bool,
    ) -> tuple[Tensor, ...]:
        """The mined pairs or triplets, without those of an embedding with itself, and the given ones after them."""
        mined = super().create_indices_tuple(embeddings, labels, E_mem, L_mem, None, False)
        if do_remove_self_comparisons:
            anchor, positive, *negative = mined
            others = positive != self.curr_batch_idx[anchor]
            negative = negative if len(mined) == 4 else [negative[0][others]]
            mined = (anchor[others], positive[others], *negative)
        if input_indices_tuple is None:
            return mined
        same_kind = lmu.convert_to_triplets if len(mined) == 3 else lmu.convert_to_pairs
        return c_f.concatenate_indices_tuples(mined, same_kind(input_indices_tuple, labels))

    def reset_queue(self) -> None:
        """Empties the queue and forgets what its adaptation observed."""
        self.queue.reset()

    @property
    def embedding_memory(self) -> Float[Tensor, "M D"]:
        """The adapted rows in the order of their slots, zeros where there is none yet. Waits for the device."""
        rows = self.queue.features()
        return nn.functional.pad(rows, (0, 0, 0, self.memory_size - len(rows)))

    @property
    def label_memory(self) -> Int64[Tensor, "M"]:
        """The label of each slot, 0 where there is none yet."""
        assert self.queue.labels is not None
        return self.queue.labels

    @property
    def queue_idx(self) -> int:
        """The slot that is written next. Waits for the device."""
        return int(self.queue.pointer)

    @property
    def has_been_filled(self) -> bool:
        """Whether every slot holds a row. Waits for the device."""
        return len(self.queue) == self.memory_size

    def _loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: tuple[Tensor, ...] | None, is_in_queue: bool
    ) -> Tensor:
        """The loss of anchors against the queue, in which they stand at ``curr_batch_idx`` if they do."""
        blockwise = None if indices_tuple is not None else self._blockwise()
        if blockwise is not None:
            return blockwise(embeddings, labels, self.queue, self_indices=self.curr_batch_idx if is_in_queue else None)
        rows = self.queue.features()
        embeddings = embeddings.to(rows.dtype)
        if len(rows) == 0:
            return embeddings.sum() * 0
        row_labels = self.label_memory[: len(rows)]
        indices_tuple = self.create_indices_tuple(embeddings, labels, rows, row_labels, indices_tuple, is_in_queue)
        return self.loss(embeddings, labels, indices_tuple, rows, row_labels)

    def _blockwise(self) -> Callable[..., Tensor] | None:
        """The blockwise form of loss and miner, if there is one that does all that they do."""
        function = BLOCKWISE.get(type(self.loss))
        margin = None if self.miner is None else _pair_margin(self.miner)
        collects = any(getattr(module, "collect_stats", False) for module in self.modules())
        if function is None or not _is_plain(self.loss) or (margin is None) != (self.miner is None) or collects:
            return None
        return functools.partial(
            function,
            temperature=self.loss.temperature,
            miner=margin,
            on_pairs=None if margin is None else self._record_pairs,
        )

    def _record_pairs(self, positives: Int64[Tensor, ""], negatives: Int64[Tensor, ""]) -> None:
        """Set what PML's miners record at each call: integers, or, so that no step waits, tensors on an accelerator."""
        counts = positives, negatives
        self.miner.num_pos_pairs, self.miner.num_neg_pairs = (c if c.is_cuda else int(c) for c in counts)

    def _store_as(self, dtype: torch.dtype) -> None:
        self.queue.rows = self.queue.rows.to(dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Torch's hook; the queue's precision is that of the checkpoint, so that it goes on as it was."""
        if prefix + "queue.rows" in state_dict:
            self._store_as(state_dict[prefix + "queue.rows"].dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _is_plain(loss: Any) -> bool:
    """Whether a SupConLoss or NTXentLoss has PML's default parts. (A regularizer would bring another reducer.)"""
    return (
        type(loss.reducer) is type(loss.get_default_reducer())
        and getattr(loss.reducer, "high", None) is None
        and _is_cosine(loss.distance)
        and isinstance(loss.temperature, int | float)
    )


def _is_cosine(distance: Any) -> bool:
    return type(distance) is CosineSimilarity and distance.p == 2 and distance.power == 1


def _pair_margin(miner: Any) -> PairMargin | None:
    """The blockwise form of a miner: PairMarginMiner by cosine, or by Euclidean distance of unit vectors."""
    if type(miner) is not PairMarginMiner:
        return None
    positive, negative, distance = miner.pos_margin, miner.neg_margin, miner.distance
    if _is_cosine(distance):
        return PairMargin(positive, negative, "cosine")
    of_unit_vectors = type(distance) is LpDistance and distance.normalize_embeddings
    if of_unit_vectors and distance.p == 2 and distance.power == 1 and min(positive, negative) >= 0:
        return PairMargin(positive, negative)
    return None


def _in_rank_order(rows: int, device: torch.device) -> Int64[Tensor, "B"]:
    """Indices that put the rows of a gathered batch in the order of the ranks they come from.

    DistributedLossWrapper gives each rank its own rows first, then the others'. Whether a batch was gathered cannot be
    known here; one that was not has its rows in another order, which is as good.
    """
    index = torch.arange(rows, device=device)
    if world() == 1 or rows % world():
        return index
    own, *others = index.chunk(world())
    return torch.cat([*others[: rank()], own, *others[rank() :]])


def _beside(tensor: Tensor, other: Tensor) -> Tensor:
    """On the other's device; from a CPU without waiting for it."""
    return tensor.to(other.device, non_blocking=tensor.device.type == "cpu")


def _class_indices(labels: Shaped[Tensor, "B"]) -> Int64[Tensor, "B"]:
    """Labels as int64, whatever they are given as."""
    if labels.is_floating_point() and not torch.equal(labels, labels.round()):
        fraction = labels[labels != labels.round()][0].item()
        raise UserError(f"expected whole numbers as labels, got {fraction}: number the classes before")
    return labels.long()
