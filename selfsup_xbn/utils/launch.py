"""What torchrun tells each process through environment variables. This module does not import torch."""

from __future__ import annotations

import os
from pathlib import Path

from selfsup_xbn.errors import UserError

WITHOUT_TORCHRUN = {
    "SLURM_NTASKS": "srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES --nproc-per-node N "
    "--rdzv-id $SLURM_JOB_ID --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m selfsup_xbn ...",
    "OMPI_COMM_WORLD_SIZE": "torchrun --nproc-per-node {n} -m selfsup_xbn ...",
    "PMI_SIZE": "torchrun --nproc-per-node {n} -m selfsup_xbn ...",
}
"""For each variable in which another launcher states its number of processes, the command to use instead."""


def launched() -> int:
    """Return the number of processes that torchrun started. No process group is required.

    Raises:
        UserError: WORLD_SIZE is no positive integer.
    """
    return _number("WORLD_SIZE", 1, minimum=1)


def launched_rank() -> int:
    """Return the rank that torchrun gave this process.

    Raises:
        UserError: RANK is no integer of at least 0.
    """
    return _number("RANK", 0)


def local_rank() -> int:
    """Return the rank of this process on its machine.

    Raises:
        UserError: LOCAL_RANK is no integer of at least 0.
    """
    return _number("LOCAL_RANK", launched_rank())


def restarts() -> int:
    """Return how many times torchrun has restarted the processes of this launch (``--max-restarts``).

    Raises:
        UserError: TORCHELASTIC_RESTART_COUNT is no integer of at least 0.
    """
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def launch_id() -> str:
    """Return a name of this launch that its restarts share and other launches do not, or ``""`` without torchrun.

    On one machine it is the folder that torchrun makes for each launch, on several machines their ``--rdzv-id``.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_1/0/error.json
    if error_file and _number("GROUP_WORLD_SIZE", 1) == 1:
        return str(Path(error_file).parents[2])
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def check_launch() -> None:
    """Check the variables that start a process group.

    Raises:
        UserError: A variable is missing or invalid, or another launcher started several processes without torchrun.
            The message names the variable.
    """
    if "WORLD_SIZE" not in os.environ:
        for name, command in WITHOUT_TORCHRUN.items():
            if (n := _number(name, 1)) > 1:
                raise UserError(
                    f"{name} is {n} and WORLD_SIZE is not set: each of the {n} processes would train the whole run; "
                    f"use {command.format(n=n)}, or unset {name} for a run of one process"
                )
    world = launched()
    if world == 1:
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"{name} is not set, but WORLD_SIZE is {world}: start the processes with torchrun")
    if launched_rank() >= world:
        raise UserError(f"RANK: expected less than WORLD_SIZE, {world}, got {launched_rank()}")
    if (port := _number("MASTER_PORT", 0)) >= 2**16:
        raise UserError(f"MASTER_PORT: expected less than {2**16}, got {port}")


def _number(name: str, default: int, *, minimum: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < minimum:
        raise UserError(f"{name}: expected an integer of at least {minimum}, got {text!r}")
    return int(text)
