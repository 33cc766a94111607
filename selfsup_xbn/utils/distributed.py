"""Distributed training with torch.distributed under torchrun.

Each process embeds its shard of a batch. The embeddings are gathered in the order of the ranks, with the gradient of
the rows of the process itself, and every process computes the same update of the queue. Each process scores the
anchors of its shard against the queue, and the shares of the loss are summed. A loss that cannot be shared out is
computed by every process for the whole batch. In both cases the gradients, which ``training.data_parallel`` sums over
the processes, are those of the loss of the whole batch. Labels follow from the sampler, which is the same on all
processes.

In a single process the functions of this module have no effect.

Axis legend: b rows of one process, B rows of all processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch import distributed as dist

from selfsup_xbn.errors import ProcessLost
from selfsup_xbn.utils.launch import local_rank

NETWORK_ERRORS = ("gloo", "NCCL", "pair closure")  # what messages of collective operations contain
TEXT_BYTES = 1024


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process. Only rank 0 writes files and prints."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def shard_slice(total: int, shard: tuple[int, int] | None = None) -> slice:
    """Return the slice of the rows that belong to a process.

    Shards are contiguous, in the order of the ranks, and their sizes differ by at most one row.

    Args:
        total: Number of rows B of all processes.
        shard: Rank and number of processes, by default those of this process.

    Example:
        >>> shard_slice(10, (1, 4))
        slice(2, 5, None)
    """
    r, n = shard or (rank(), world())
    return slice(r * total // n, (r + 1) * total // n)


def gather(rows: Shaped[Tensor, "b *rest"], total: int) -> Shaped[Tensor, "B *rest"]:
    """Gather the rows of all processes, in the order of the ranks.

    Args:
        rows: Rows of this process, the shard of ``shard_slice(total)``, [b, ...].
        total: Number of rows B of all processes.

    Returns:
        Rows of all processes, [B, ...]. Gradients flow to the rows of this process only.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    if world() == 1:
        return rows
    shards = [shard_slice(total, (r, world())) for r in range(world())]
    counts = [shard.stop - shard.start for shard in shards]
    longest = max(counts)  # gloo requires equal numbers of rows
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    gathered = rows.new_empty(world() * longest, *rows.shape[1:])
    # torch 2.14 renamed the function and deprecated the old name
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    with peers():
        getattr(dist, name)(gathered, padded)
    pieces = [piece[:count] for piece, count in zip(gathered.split(longest), counts, strict=True)]
    pieces[rank()] = rows
    return torch.cat(pieces)


@torch.no_grad()
def shuffle(rows: Shaped[Tensor, "b *rest"], order: Int64[Tensor, "B"]) -> Shaped[Tensor, "c *rest"]:
    """Return the shard of this process of a batch in another order. Each row is sent once, to one process.

    Args:
        rows: Rows of this process, the shard of ``shard_slice(len(order))``.
        order: Permutation of the whole batch, the same on all processes, on the CPU.

    Returns:
        The rows ``order[shard_slice(len(order))]`` of the whole batch.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    if world() == 1:
        return rows[order]
    shards = [shard_slice(len(order), (r, world())) for r in range(world())]
    own = shards[rank()]
    # Process r needs the rows order[shards[r]]. It gets them in order from process 0, then in order from process 1, ...
    sent = [order[shard][(order[shard] >= own.start) & (order[shard] < own.stop)] - own.start for shard in shards]
    source = torch.bucketize(order[own], torch.tensor([shard.stop for shard in shards]), right=True)
    received = [int((source == r).sum()) for r in range(world())]
    incoming = rows.new_empty(len(source), *rows.shape[1:])
    with peers():
        dist.all_to_all_single(incoming, rows[torch.cat(sent)].contiguous(), received, [len(index) for index in sent])
    return incoming[source.argsort(stable=True).argsort()]


@torch.no_grad()
def all_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, without gradient.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    total = tensor.detach().clone()
    if world() > 1:
        with peers():
            dist.all_reduce(total)
    return total


def sum_gradient(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that all processes have. Its gradient is summed over the processes."""
    copy = tensor.view_as(tensor)
    if copy.requires_grad:
        copy.register_hook(all_sum)
    return copy


def sum_of_shares(share: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return a loss, given the share of this process: the value of the sum, with the gradient of the share.

    The sum of the gradients over the processes is then the gradient of the loss.

    Args:
        share: Share of the loss, such as the sum over the anchors of this process divided by those of all processes.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    return share if world() == 1 else share + (all_sum(share) - share.detach())


def from_first(tensor: Tensor) -> Tensor:
    """Replace a tensor by that of rank 0, in place, and return it.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    if world() > 1:
        with peers():
            dist.broadcast(tensor, src=0)
    return tensor


@torch.no_grad()
def average_(tensors: list[Tensor]) -> None:
    """Average tensors over the processes, in place.

    Args:
        tensors: Tensors of any shapes, the same shapes on all processes.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with peers():
        dist.all_reduce(flat)
    flat.div_(world())
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


class AnyProcess:
    """Flags that are true on all processes at the same call if any process has set them.

    With several processes a call returns the flags of the previous call. The flags are exchanged on the CPU while a
    step is computed, so that no process waits for a device, or for a process that is less than one step behind.
    """

    def __init__(self) -> None:
        self._flags: Tensor | None = None
        self._work: dist.Work | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """Set the flags of this process, and return which flags any process has set.

        Raises:
            ProcessLost: Another process ended or timed out.
        """
        if world() == 1:
            return [*flags]
        with peers():
            if self._work:
                self._work.wait()
            any_set = [False for _ in flags] if self._flags is None else (self._flags > 0).tolist()
            self._flags = torch.tensor(flags, dtype=torch.float32)
            self._work = dist.all_reduce(self._flags, async_op=True)
        return any_set


def bytes_from_first(data: bytes) -> bytes:
    """Return the bytes that process 0 passes.

    Args:
        data: Bytes of process 0. Those of other processes are not used.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    if world() == 1:
        return data
    size = from_first(torch.tensor(len(data)))
    content = torch.empty(int(size), dtype=torch.uint8)
    if rank() == 0 and data:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return from_first(content).numpy().tobytes()


def first_text(text: str) -> str:
    """Return the text of the first process, in the order of the ranks, whose text is not empty.

    Args:
        text: Text of this process. At most ``TEXT_BYTES`` bytes of it are used.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    row = torch.zeros(1, TEXT_BYTES, dtype=torch.uint8)
    encoded = text.encode()[:TEXT_BYTES]
    row[0, : len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    texts = [bytes(values).rstrip(b"\0").decode(errors="ignore") for values in gather(row, world()).tolist()]
    return next(filter(None, texts), "")


def wait_for_all() -> None:
    """Wait until all processes have called this function.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    if world() > 1:
        with peers():
            dist.all_reduce(torch.zeros(()))


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Execute the block on the first process of a machine before the others, so that only one process downloads files.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    if local_rank() > 0:
        wait_for_all()
    yield
    if local_rank() == 0:
        wait_for_all()


@contextlib.contextmanager
def peers(*, computes: bool = False) -> Iterator[None]:
    """Convert the ``RuntimeError`` that torch raises for a lost process to a ``ProcessLost`` of one line.

    Args:
        computes: Whether the block also computes, so that errors without a sign of the network are not converted.

    Raises:
        ProcessLost: Another process ended or timed out.
    """
    try:
        yield
    except RuntimeError as error:
        network = isinstance(error, dist.DistError) or any(sign in str(error) for sign in NETWORK_ERRORS)
        if computes and not network:
            raise
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise ProcessLost(
            f"another process of the run ended or did not respond within --timeout ({reason}); "
            "continue from the last checkpoint with --resume"
        ) from error
