"""Runs the command line in several processes, as torchrun would, but forked: torch need not be imported again."""

import multiprocessing
import os
import socket
import sys
import time
from typing import NamedTuple

import torch

from selfsup_xbn.cli import main
from selfsup_xbn.training import trainer as train


class Ended(NamedTuple):
    """How each process ended, and what it printed."""

    codes: list[int]
    out: list[str]
    err: list[str]


def launch(folder, processes, arguments, at_step=None):
    """``main(arguments)`` in each process; ``at_step(run, rank)`` is called after each of its steps.

    Each process leaves the state of its method in ``rank-R.pt`` in ``folder``, whose files others are of no run.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    given = [(rank, processes, port, folder, arguments, at_step) for rank in range(processes)]
    children = [context.Process(target=_child, args=each) for each in given]
    since = time.monotonic()
    for child in children:
        child.start()
    for child in children:
        child.join(max(0.0, since + 60 - time.monotonic()))
    for child in children:
        child.kill()
        child.join()
    texts = [[(folder / f"{name}-{rank}").read_text() for rank in range(processes)] for name in ("out", "err")]
    return Ended([child.exitcode for child in children], *texts)


def _child(rank, processes, port, folder, arguments, at_step):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.setsid()  # as torchrun does
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = (open(folder / f"{name}-{rank}", "w", buffering=1) for name in ("out", "err"))  # noqa: SIM115
    whole, step = train._train, train.Run.train_step

    def keep(*args, **kwargs):
        run = whole(*args, **kwargs)
        torch.save(run.method.state_dict(), folder / f"rank-{rank}.pt")
        return run

    def watched(run, batch):
        step(run, batch)
        at_step(run, rank)

    train._train = keep
    if at_step:
        train.Run.train_step = watched
    sys.exit(main(arguments))
