"""The step of a loss against a memory, beside its peers: queue work, loss, gradient by the anchors.

``WORKS[work][name](device)`` makes the inputs, the same for all, and returns a function that does one step. Every step
takes the next of many batches, as training would. "bare" is the two matrix products of the queue with the batch, each
made at once and its result kept whole: a yardstick, not a bound, since a step may go block by block, and with a miner
leave out what is not kept. Peers' memories are not adapted, nor is that of "ours, XBM"; with "ours, XBN" a miner keeps
other negatives. Peers are imported only when asked for.

Sizes: supervised as for SOP (B 64, D 512, M half of its training set; and 200,000), MoCo as for CIFAR (B 128, M 4,096,
D 128) and as for ImageNet (B 256, M 65,536, D 128).
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
    """Unit features of a network in training and their labels: ``BATCHES`` batches, and a full memory.

    With ``MIDDLE`` cosines are 0.8 in a class and 0.65 +- 0.02 across, so that the miner keeps all positives and, in a
    memory as it is, a negative in 16; with a smaller ``alike``, as later in training, fewer, with ``LATE`` one in 190.
    In a memory that XBN adapts it keeps one in 6 and one in 44.
    """
    generator = torch.Generator().manual_seed(0)
    common, centres = torch.randn(dim, generator=generator), torch.randn(CLASSES, dim, generator=generator)

    def draw(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), dim, generator=generator)
        return F.normalize(alike * common + 0.4 * centres[labels] + 0.2**0.5 * noise, dim=1)

    each = batch // PER_CLASS
    chosen = torch.stack([torch.randperm(CLASSES, generator=generator)[:each] for _ in range(BATCHES)])
    labels, row_labels = chosen.flatten().repeat_interleave(PER_CLASS), torch.arange(rows) % CLASSES
    return draw(labels).view(BATCHES, batch, dim), labels.view(BATCHES, batch), draw(row_labels), row_labels


def moco_inputs(batch: int, rows: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit queries and keys [BATCHES, B, D], and a full memory."""
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(BATCHES, batch, dim, generator=generator), dim=2)
    noise = torch.randn(BATCHES, batch, dim, generator=generator)
    queries = F.normalize(keys + 0.5 * noise / dim**0.5, dim=2)
    return queries, keys, F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def step_of(loss: Callable[[Tensor, int], Tensor], anchors: Tensor, device: str) -> Step:
    """A function that takes the next batch, and makes its loss and the gradient by its anchors."""
    turn = count()
    leaves = [batch.to(device).requires_grad_() for batch in anchors]

    def step() -> None:
        number = next(turn) % len(leaves)
        loss(leaves[number], number).backward()
        leaves[number].grad = None
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def bare(inputs: Callable[..., Any], sizes: tuple[Any, ...], device: str) -> Step:
    """Both products of the batch with the memory."""
    found = inputs(*sizes)
    anchors, memory = found[0].to(device), found[2].to(device)
    turn = count()

    def step() -> None:
        batch = anchors[next(turn) % BATCHES]
        _ = (batch @ memory.T) @ memory
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def copy(rows: int, dim: int, device: str) -> Step:
    """A copy of the memory, which reads and writes it once."""
    memory = torch.zeros(rows, dim, device=device)
    copied = torch.empty_like(memory)

    def step() -> None:
        copied.copy_(memory)
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def supervised_ours(adaptation: str, sizes: tuple[int, int, int, float], device: str) -> Step:
    from selfsup_xbn import FeatureQueue
    from selfsup_xbn.losses import PairMargin, sup_con

    anchors, labels, memory, row_labels = supervised_inputs(*sizes)
    labels = labels.to(device)
    queue = FeatureQueue(sizes[1], sizes[2], adaptation, labels=True, device=device)
    queue.enqueue(memory.to(device), row_labels.to(device))

    def loss(z: Tensor, number: int) -> Tensor:
        queue.adapt(z)
        slots = queue.enqueue(z, labels[number])
        return sup_con(z, labels[number], queue, temperature=T, miner=PairMargin(), self_indices=slots)

    return step_of(loss, anchors, device)


def supervised_pml(sizes: tuple[int, int, int, float], device: str) -> Step:
    from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
    from pytorch_metric_learning.miners import PairMarginMiner

    anchors, labels, memory, row_labels = supervised_inputs(*sizes)
    labels = labels.to(device)
    bank = CrossBatchMemory(SupConLoss(T), sizes[2], sizes[1], PairMarginMiner(0.2, 0.8)).to(device)
    bank.add_to_memory(memory.to(device), row_labels.to(device), len(memory))
    return step_of(lambda z, number: bank(z, labels[number]), anchors, device)


def moco_ours(adaptation: str, sizes: tuple[int, int, int], device: str) -> Step:
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
    """As in MoCo's own program: all logits, cross entropy, then the keys over the oldest rows."""
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
    from lightly.loss import NTXentLoss

    queries, keys, memory = moco_inputs(*sizes)
    keys = keys.to(device)
    criterion = NTXentLoss(T, memory_bank_size=(sizes[1], sizes[2])).to(device)
    criterion(queries[0].to(device), keys[0])  # makes the bank
    criterion.memory_bank.bank = memory.to(device) if criterion.memory_bank.bank.shape[0] == sizes[1] else memory.T
    return step_of(lambda q, number: criterion(q, keys[number]), queries, device)


def moco_pml(sizes: tuple[int, int, int], device: str) -> Step:
    """As its MoCo notebook: every key of the memory is a class of its own."""
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
        "pytorch-metric-learning": partial(supervised_pml, sizes),
    }


def _moco(batch: int, rows: int) -> dict[str, Callable[[str], Step]]:
    sizes = (batch, rows, 128)
    found: dict[str, Callable[[str], Step]] = {
        "bare": partial(bare, moco_inputs, sizes),
        "ours, XBN": partial(moco_ours, "xbn", sizes),
        "ours, XBM": partial(moco_ours, "xbm", sizes),
        "plain": partial(moco_plain, sizes),
        "lightly": partial(moco_lightly, sizes),
        "pytorch-metric-learning": partial(moco_pml, sizes),
    }
    if rows > 10_000:  # a matrix of B x B M entries: 17 GB
        del found["pytorch-metric-learning"]
    return found


def _memory(rows: int) -> dict[str, Callable[[str], Step]]:
    return {name: partial(moco_ours, name.lower(), (128, rows, 128)) for name in ("XBM", "XBN")}


SCALES: dict[str, dict[int, dict[str, Callable[[str], Step]]]] = {
    "M": {rows: _supervised(rows) for rows in (4_096, 16_384, 65_536, 262_144)},
    "D": {dim: _supervised(29_775, dim=dim) for dim in (64, 128, 256, 512, 1_024)},
    "B": {batch: _supervised(29_775, batch=batch) for batch in (16, 64, 256)},
}
MEMORIES = (4_096, 65_536, 262_144, 1_000_000)
WORKS: dict[str, dict[str, Callable[[str], Step]]] = {
    "supervised-29775": _supervised(29_775),
    "supervised-200000": _supervised(200_000),
    "supervised-late": _supervised(29_775, alike=LATE),
    "moco-4096": _moco(128, 4_096),
    "moco-65536": _moco(256, 65_536),
    **{f"memory-{rows}": _memory(rows) for rows in MEMORIES},
}
