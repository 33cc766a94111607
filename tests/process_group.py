"""Runs several checks in one group of forked processes, so that a group is started once for all of them."""

import multiprocessing
import os
import traceback

import torch
from torch import distributed as dist


def run_in_group(folder, processes, checks):
    """Run the functions in each of the forked processes; return the error of each check by name, ``""`` if it passed.

    A check is called with the rank. After a failure the processes may be out of step, so that later checks are not run.
    """
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_child, args=(rank, processes, folder, checks)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        child.kill()
        child.join()
    errors = {check.__name__: "did not run" for check in checks}
    for name in errors:
        reports = [folder / f"{name}-{rank}" for rank in range(processes)]
        if all(report.exists() for report in reports):
            errors[name] = "\n".join(filter(None, (report.read_text() for report in reports)))
    return errors


def _child(rank, processes, folder, checks):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    for check in checks:
        torch.manual_seed(0)
        try:
            check(rank)
            error = ""
        except BaseException:
            error = f"process {rank}: {traceback.format_exc()}"
        (folder / f"{check.__name__}-{rank}").write_text(error)
        if error:
            os._exit(1)
    os._exit(0)
