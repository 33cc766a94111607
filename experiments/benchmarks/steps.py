"""Works of a step with a queue and of its peers: queue update, loss, and gradient with respect to the anchors.

``WORKS[work][name](device)`` creates the inputs, which are equal for all implementations, and returns a function that
performs one step. Each step uses the next of many batches. "bare" computes the two matrix products of the batch with
the queue, without blocks. A step can be faster than "bare", because a miner may exclude pairs. The queues of the peers
and of "ours, XBM" are not adapted. With "ours, XBN" a miner therefore keeps other negatives. A peer is imported when
its function is called.

Sizes: supervised with those of Omniglot (B 16, D 128, M 6,000) and SOP (B 64, D 512, M half of its training set), and
with M 200,000; MoCo with those for CIFAR (B 128, M 4,096, D 128) and ImageNet (B 256, M 65,536, D 128).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[], Any]
T = 0.1
CLASSES, PER_CLASS, BATCHES = 11_318, 4, 256
MIDDLE, LATE = 0.8, 0.76


def supervised_inputs(batch: int, rows: int, dim: int, alike: float = MIDDLE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return unit embeddings and labels of ``BATCHES`` batches, and those of a full queue.

    With ``MIDDLE``, cosine similarities are 0.8 within a class and 0.65 +- 0.02 between classes. The miner then keeps
    all positives, and 1 of 16 negatives of a plain queue or 1 of 6 negatives of a queue adapted by XBN. With ``LATE``,
    as later in training, it keeps 1 of 190 or 1 of 44 negatives.

    Args:
        batch: batch size B, a multiple of 4.
        rows: number of rows M.
        dim: number of dimensions D.
        alike: weight of the component that all embeddings share.
    """
    generator = torch.Generator().manual_seed(0)
    common, centers = torch.randn(dim, generator=generator), torch.randn(CLASSES, dim, generator=generator)

    def draw(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), dim, generator=generator)
        return F.normalize(alike * common + 0.4 * centers[labels] + 0.2**0.5 * noise, dim=1)

    classes = batch // PER_CLASS
    drawn = torch.stack([torch.randperm(CLASSES, generator=generator)[:classes] for _ in range(BATCHES)])
    labels, row_labels = drawn.flatten().repeat_interleave(PER_CLASS), torch.arange(rows) % CLASSES
    return draw(labels).view(BATCHES, batch, dim), labels.view(BATCHES, batch), draw(row_labels), row_labels


def moco_inputs(batch: int, rows: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit queries and keys [BATCHES, B, D], and the rows [M, D] of a full queue."""
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(BATCHES, batch, dim, generator=generator), dim=2)
    noise = torch.randn(BATCHES, batch, dim, generator=generator)
    queries = F.normalize(keys + 0.5 * noise / dim**0.5, dim=2)
    return queries, keys, F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def step_of(loss: Callable[[Tensor, int], Tensor], anchors: Tensor, device: str) -> Step:
    """Return a function that computes the loss of the next batch and its gradient with respect to the anchors."""
    steps = count()
    leaves = [batch.to(device).requires_grad_() for batch in anchors]

    def step() -> None:
        number = next(steps) % len(leaves)
        loss(leaves[number], number).backward()
        leaves[number].grad = None
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def bare(inputs: Callable[..., Any], sizes: tuple[Any, ...], device: str) -> Step:
    """Return a function that computes both products of the next batch with the queue."""
    tensors = inputs(*sizes)
    anchors, memory = tensors[0].to(device), tensors[2].to(device)
    steps = count()

    def step() -> None:
        batch = anchors[next(steps) % BATCHES]
        _ = (batch @ memory.T) @ memory
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def copy(rows: int, dim: int, device: str) -> Step:
    """Return a function that copies the queue, which reads and writes it once."""
    memory = torch.zeros(rows, dim, device=device)
    copied = torch.empty_like(memory)

    def step() -> None:
        copied.copy_(memory)
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def supervised_ours(
    adaptation: str, sizes: tuple[int, int, int, float], device: str, *, moment_gradient: bool = False
) -> Step:
    """Return a supervised step of this package."""
    from selfsup_xbn import FeatureQueue
    from selfsup_xbn.losses import PairMargin, sup_con

    anchors, labels, memory, row_labels = supervised_inputs(*sizes)
    labels = labels.to(device)
    queue = FeatureQueue(sizes[1], sizes[2], adaptation, labels=True, device=device)
    queue.enqueue(memory.to(device), row_labels.to(device))

    def loss(z: Tensor, number: int) -> Tensor:
        queue.adapt(z)
        slots = queue.enqueue(z, labels[number])
        adapted_to = z if moment_gradient else None
        return sup_con(
            z, labels[number], queue, temperature=T, miner=PairMargin(), self_indices=slots, adapted_to=adapted_to
        )

    return step_of(loss, anchors, device)


def supervised_pml(sizes: tuple[int, int, int, float], device: str) -> Step:
    """Return a supervised step of PyTorch Metric Learning."""
    from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
    from pytorch_metric_learning.miners import PairMarginMiner

    anchors, labels, memory, row_labels = supervised_inputs(*sizes)
    labels = labels.to(device)
    bank = CrossBatchMemory(SupConLoss(T), sizes[2], sizes[1], PairMarginMiner(0.2, 0.8)).to(device)
    bank.add_to_memory(memory.to(device), row_labels.to(device), len(memory))
    return step_of(lambda z, number: bank(z, labels[number]), anchors, device)


def moco_ours(adaptation: str, sizes: tuple[int, int, int], device: str) -> Step:
    """Return a MoCo step of this package."""
    from selfsup_xbn import FeatureQueue
    from selfsup_xbn.losses import info_nce

    queries, keys, memory = moco_inputs(*sizes)
    keys = keys.to(device)
    queue = FeatureQueue(sizes[1], sizes[2], adaptation, device=device)
    queue.enqueue(memory.to(device))

    def loss(q: Tensor, number: int) -> Tensor:
        queue.adapt(keys[number])
        slots = queue.enqueue(keys[number])
        return info_nce(q, keys[number], queue, T, slots)

    return step_of(loss, queries, device)


def moco_plain(sizes: tuple[int, int, int], device: str) -> Step:
    """Return a step of the original MoCo program: all logits, cross entropy, and an update of the queue."""
    queries, keys, memory = moco_inputs(*sizes)
    keys, queue = keys.to(device), memory.T.contiguous().to(device)
    target = torch.zeros(sizes[0], dtype=torch.long, device=device)
    pointer = 0

    def loss(q: Tensor, number: int) -> Tensor:
        nonlocal pointer
        k = keys[number]
        positive = torch.einsum("nc,nc->n", q, k)[:, None]
        value = F.cross_entropy(torch.cat([positive, q @ queue.clone()], dim=1) / T, target)
        queue[:, pointer : pointer + len(k)] = k.T
        pointer = (pointer + len(k)) % queue.shape[1]
        return value

    return step_of(loss, queries, device)


def moco_lightly(sizes: tuple[int, int, int], device: str) -> Step:
    """Return a MoCo step of lightly."""
    from lightly.loss import NTXentLoss

    queries, keys, memory = moco_inputs(*sizes)
    keys = keys.to(device)
    criterion = NTXentLoss(T, memory_bank_size=(sizes[1], sizes[2])).to(device)
    criterion(queries[0].to(device), keys[0])  # allocates the bank
    criterion.memory_bank.bank = memory.to(device) if criterion.memory_bank.bank.shape[0] == sizes[1] else memory.T
    return step_of(lambda q, number: criterion(q, keys[number]), queries, device)


def moco_pml(sizes: tuple[int, int, int], device: str) -> Step:
    """Return a step of the MoCo notebook of PML, where every key has a unique label."""
    from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss

    queries, keys, memory = moco_inputs(*sizes)
    keys, rows = keys.to(device), sizes[1]
    bank = CrossBatchMemory(NTXentLoss(T), sizes[2], rows).to(device)
    bank.add_to_memory(memory.to(device), torch.arange(rows, device=device), rows)
    enqueued = torch.arange(2 * sizes[0], device=device) >= sizes[0]
    start = count(rows, sizes[0])

    def loss(q: Tensor, number: int) -> Tensor:
        labels = torch.arange(sizes[0], device=device) + next(start)
        return bank(torch.cat([q, keys[number]]), labels.repeat(2), enqueue_mask=enqueued)

    return step_of(loss, queries, device)


def _supervised(rows: int, batch: int = 64, dim: int = 512, alike: float = MIDDLE) -> dict[str, Callable[[str], Step]]:
    sizes = (batch, rows, dim, alike)
    return {
        "bare": partial(bare, supervised_inputs, sizes),
        "ours, XBN": partial(supervised_ours, "xbn", sizes),
        "ours, XBM": partial(supervised_ours, "xbm", sizes),
        "ours, XBN, moment gradient": partial(supervised_ours, "xbn", sizes, moment_gradient=True),
        "pytorch-metric-learning": partial(supervised_pml, sizes),
    }


def _moco(batch: int, rows: int) -> dict[str, Callable[[str], Step]]:
    sizes = (batch, rows, 128)
    peers: dict[str, Callable[[str], Step]] = {
        "bare": partial(bare, moco_inputs, sizes),
        "ours, XBN": partial(moco_ours, "xbn", sizes),
        "ours, XBM": partial(moco_ours, "xbm", sizes),
        "plain": partial(moco_plain, sizes),
        "lightly": partial(moco_lightly, sizes),
        "pytorch-metric-learning": partial(moco_pml, sizes),
    }
    if rows > 10_000:  # its matrix of B x B M entries needs 17 GB
        del peers["pytorch-metric-learning"]
    return peers


def _memory(rows: int) -> dict[str, Callable[[str], Step]]:
    return {name: partial(moco_ours, name.lower(), (128, rows, 128)) for name in ("XBM", "XBN")}


SCALES: dict[str, dict[int, dict[str, Callable[[str], Step]]]] = {
    "M": {rows: _supervised(rows) for rows in (4_096, 16_384, 65_536, 262_144)},
    "D": {dim: _supervised(29_775, dim=dim) for dim in (64, 128, 256, 512, 1_024)},
    "B": {batch: _supervised(29_775, batch=batch) for batch in (16, 64, 256)},
}
MEMORIES = (4_096, 65_536, 262_144, 1_000_000)
WORKS: dict[str, dict[str, Callable[[str], Step]]] = {
    "supervised-6000": _supervised(6_000, batch=16, dim=128),
    "supervised-29775": _supervised(29_775),
    "supervised-200000": _supervised(200_000),
    "supervised-late": _supervised(29_775, alike=LATE),
    "moco-4096": _moco(128, 4_096),
    "moco-65536": _moco(256, 65_536),
    **{f"memory-{rows}": _memory(rows) for rows in MEMORIES},
}
