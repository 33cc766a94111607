"""Runs the command line in several forked processes, alone or under torchrun's agent: torch is not imported again."""

import logging
import multiprocessing
import os
import socket
import sys
import time
from typing import NamedTuple

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from selfsup_xbn.cli import main
from selfsup_xbn.training import trainer
from selfsup_xbn.training.run import Run
from tests.command_line import each_step

PATIENCE = 60
"""Seconds after which processes that have not ended are killed; their exit code is then -9."""


class Ended(NamedTuple):
    """Exit code and output of each process."""

    codes: list[int]
    out: list[str]
    err: list[str]


def launch(folder, processes, arguments, at_step=None):
    """Run ``main(arguments)`` in each process; ``at_step(step, rank)`` is called in each optimizer step, from 1.

    ``arguments`` may be a function of the rank.
    Each process leaves the state of its method in ``rank-R.pt`` in ``folder``, which is no run's folder.
    """
    folder.mkdir(exist_ok=True)
    port = free_port()
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


def torchrun(folder, processes, arguments, at_step=None, max_restarts=3):
    """Run ``main(arguments)`` as ``torchrun --max-restarts`` does; return whether the last attempt succeeded.

    ``at_step(step, rank)`` is called as in ``launch``, in all attempts; the environment tells which one it is.
    """
    folder.mkdir(exist_ok=True)
    agent = multiprocessing.get_context("fork").Process(
        target=_agent, args=(folder, processes, arguments, at_step, max_restarts)
    )
    agent.start()
    agent.join((max_restarts + 1) * PATIENCE)
    agent.terminate()
    agent.join()
    return agent.exitcode == 0


def _agent(folder, processes, arguments, at_step, max_restarts):
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        max_restarts=max_restarts,
        start_method="fork",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0},
        run_id="none",
        monitor_interval=0.05,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
    )
    logging.disable()
    elastic_launch(config, _child_of_agent)(folder, arguments, at_step)


def _child_of_agent(folder, arguments, at_step):
    os.setsid()
    _run(int(os.environ["RANK"]), folder, arguments, at_step, mode="a")


def free_port():
    """Return a port of this machine that no program uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _child(rank, processes, port, folder, arguments, at_step):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.setsid()  # as torchrun does
    _run(rank, folder, arguments, at_step)


def _run(rank, folder, arguments, at_step, mode="w"):
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = (open(folder / f"{name}-{rank}", mode, buffering=1) for name in ("out", "err"))  # noqa: SIM115
    arguments = arguments(rank) if callable(arguments) else arguments
    runs = []

    class KeptRun(Run):
        def __init__(self, config):
            super().__init__(config)
            runs.append(self)

    trainer.Run = KeptRun
    with each_step(lambda _: at_step and at_step(len(steps), rank)) as steps:
        code = main(arguments)
    if runs:
        torch.save(runs[-1].method.state_dict(), folder / f"rank-{rank}.pt")
    sys.exit(code)
