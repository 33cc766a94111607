"""Runs the command line in several processes, as torchrun does, but forked: torch is not imported again."""

import multiprocessing
import os
import socket
import sys
import time
from typing import NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_hook

from selfsup_xbn.cli import main
from selfsup_xbn.methods.metric_learning import MetricLearning
from selfsup_xbn.methods.moco import MoCo
from tests.command_line import each_step

PATIENCE = 60
"""Seconds after which processes that have not ended are killed; their exit code is then -9."""


class Ended(NamedTuple):
    """Exit code and output of each process."""

    codes: list[int]
    out: list[str]
    err: list[str]


def launch(folder, processes, arguments, at_step=None):
    """Run ``main(arguments)`` in each process; ``at_step(step, rank)`` is called in each optimiser step, from 1.

    Each process leaves the state of its method in ``rank-R.pt`` in ``folder``, which is no run's folder.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    places = [(rank, processes, port, folder, arguments, at_step) for rank in range(processes)]
    children = [context.Process(target=_child, args=place) for place in places]
    started = time.monotonic()
    for child in children:
        child.start()
    for child in children:
        child.join(max(0.0, started + PATIENCE - time.monotonic()))
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
    methods = {}

    def keep(module, inputs, output):
        if isinstance(module, MoCo | MetricLearning):
            methods["last"] = module

    register_module_forward_hook(keep)
    with each_step(lambda _: at_step and at_step(len(steps), rank)) as steps:
        code = main(arguments)
    if methods:
        torch.save(methods["last"].state_dict(), folder / f"rank-{rank}.pt")
    sys.exit(code)
