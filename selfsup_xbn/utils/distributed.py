"""Several processes that train as one: torch.distributed, under torchrun, as far as a run needs it.

Each process embeds its shard of a batch. The embeddings are gathered in the order of the ranks, with the gradient of a
process's own rows, and every process computes the queue's step and the loss of the whole batch. So queue, loss and
log are the same on all, whatever the loss is and however it counts its pairs. The price is that each process scores
B anchors and not B / n, which is little beside an encoder. What is exchanged are embeddings, gradients and, for MoCo's
shuffle, one view of each image; labels follow from the sampler's plan, which all know.

Gradients are summed in one all-reduce of one flat tensor, which carries BatchNorm's running statistics too.
DistributedDataParallel would overlap it with the backward pass, but takes the mean where a sum is meant, needs other
flags for the stage that trains the head alone and for parameters without gradient, and rebuilds its buckets after the
first step, so that a run that resumes would add floats in another order.

In one process nothing here does anything.

Axis legend: b rows of one process, B rows of all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch import distributed as dist

from selfsup_xbn.errors import ProcessLost


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; 0 alone writes and prints."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def launched() -> int:
    """Number of processes that torchrun started, whether or not they have met."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def shard_slice(total: int, shard: tuple[int, int] | None = None) -> slice:
    """Return this process's shard of ``total`` rows, or that of process ``r`` of ``n``.

    Shards are contiguous, in the order of the ranks, and differ by one row at most.
    """
    r, n = shard or (rank(), world())
    return slice(r * total // n, (r + 1) * total // n)


def gather(rows: Shaped[Tensor, "b *rest"], total: int) -> Shaped[Tensor, "B *rest"]:
    """The ``total`` rows of which each process has its shard, on every process; gradient flows to its own rows."""
    if world() == 1:
        return rows
    shards = [shard_slice(total, (r, world())) for r in range(world())]
    counts = [shard.stop - shard.start for shard in shards]
    longest = max(counts)  # gloo takes equal numbers of rows
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    gathered = rows.new_empty(world() * longest, *rows.shape[1:])
    # torch 2.14 has a new name for it, and warns of the old one
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    with _peers():
        getattr(dist, name)(gathered, padded)
    pieces = [piece[:count] for piece, count in zip(gathered.split(longest), counts, strict=True)]
    pieces[rank()] = rows
    return torch.cat(pieces)


def from_first(tensor: Tensor) -> Tensor:
    """The tensor of process 0, in place of this one's."""
    if world() > 1:
        with _peers():
            dist.broadcast(tensor, src=0)
    return tensor


@torch.no_grad()
def reduce_(sums: list[Tensor], means: list[Tensor]) -> None:
    """Sums some tensors over the processes, averages others, in place."""
    tensors = [*sums, *means]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with _peers():
        dist.all_reduce(flat)
    flat[sum(tensor.numel() for tensor in sums) :].div_(world())
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


class AnyProcess:
    """Whether any process said yes, which all hear at the same call.

    What is said at one call is heard at the next: the answers travel on the CPU while a step is computed, so that no
    device is waited for, and another process only where it is a whole step behind.
    """

    def __init__(self) -> None:
        self._said = torch.zeros(())
        self._sent: dist.Work | None = None

    def __call__(self, yes: bool) -> bool:
        if world() == 1:
            return yes
        with _peers():
            if self._sent:
                self._sent.wait()
            heard = bool(self._said)
            self._said = torch.tensor(float(yes))
            self._sent = dist.all_reduce(self._said, async_op=True)
        return heard


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    if world() > 1:
        with _peers():
            dist.all_reduce(torch.zeros(()))


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """A machine's first process does the block before the others begin: it downloads, they find what they need."""
    if local_rank() > 0:
        wait_for_all()
    yield
    if local_rank() == 0:
        wait_for_all()


@contextlib.contextmanager
def process_group(timeout: int) -> Iterator[bool]:
    """Brings together the processes that torchrun started; yields whether this is the first of them.

    Gloo carries what lies on the CPU, nccl what lies on CUDA devices. An error that leaves the block gets an attribute
    ``already_reported``: whether another process has reported an error.

    Args:
        timeout: seconds that a process waits for the others before it gives up.
    """
    if launched() == 1:
        yield True
        return
    patience = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _peers():
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    try:
        yield rank == 0
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # the store may have gone with its process
            error.already_reported = store.add("reported", 1) > 1  # type: ignore[attr-defined]
        raise  # and no farewell: processes that are lost would be waited for
    wait_for_all()
    dist.destroy_process_group()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Raise ProcessLost in place of torch's error when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise ProcessLost(
            f"another process of the run ended, or did not answer within --timeout ({reason}); "
            "go on from the last checkpoint with --resume"
        ) from error
