"""The process group of the processes that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import distributed as dist

from selfsup_xbn.errors import UserError
from selfsup_xbn.utils.distributed import peers, wait_for_all
from selfsup_xbn.utils.launch import check_launch, launched, restarts


@contextlib.contextmanager
def process_group(timeout: int) -> Iterator[bool]:
    """Create the process group of the processes that torchrun started.

    The backend is gloo for CPU tensors and nccl for CUDA tensors. An exception of the block gets an attribute
    ``already_reported``: whether another process has raised an exception before.

    Args:
        timeout: Seconds that a process waits for the others.

    Yields:
        Whether this is the first process.

    Raises:
        UserError: A variable of the launch is missing or invalid, or the port is in use.
        ProcessLost: Another process ended or timed out.
    """
    check_launch()
    if launched() == 1:
        yield True
        return
    limit = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with peers(), _free_port():
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"restart {restarts()}", store)  # processes that were lost have written to it
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    try:
        yield rank == 0
    except Exception as error:
        error.already_reported = rank > 0  # type: ignore[attr-defined]
        with contextlib.suppress(RuntimeError):  # the process of the store may have ended
            error.already_reported = store.add("reported", 1) > 1  # type: ignore[attr-defined]
        raise  # the process group is not destroyed, as this would wait for lost processes
    wait_for_all()
    dist.destroy_process_group()


@contextlib.contextmanager
def _free_port() -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT: expected a free port, but another program uses {os.environ['MASTER_PORT']}: choose another "
            "one, with torchrun --master-port"
        ) from error
