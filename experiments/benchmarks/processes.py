"""Measure what a process of a distributed run computes and exchanges.

    python -m experiments.benchmarks.processes shares [--rounds 7]   # CPU time of the SupCon loss of one of n processes
    python -m experiments.benchmarks.processes link [--rounds 5]     # a step of two processes on a link of 1.5 Gbit/s
    python -m experiments.benchmarks.processes views                 # bytes of views that MoCo's shuffle sends

``shares`` computes, in one process, the loss and its gradient for the anchors of one of n processes. ``link`` needs
root on Linux: it runs two processes in a network namespace whose loopback device is throttled with ``tc``, so that both
directions share the link. The results are written to ``results/processes-NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from experiments.runs import RESULTS
from selfsup_xbn import FeatureQueue
from selfsup_xbn.losses import PairMargin, sup_con
from selfsup_xbn.runs.environment import environment
from selfsup_xbn.training.data_parallel import GradientSum
from selfsup_xbn.utils.distributed import shard_slice, shuffle

BATCH, ROWS, DIM, CLASSES = 512, 50_000, 512, 5_000
COUNTS = (1, 8, 64)
LAYERS, WIDTH, IMAGES = 18, 1_000, 256  # 18 million weights: 72 MB of gradients in float32
RATE = "1500mbit"
MODES = ("by hand", "none", "bf16")
SHUFFLED = 3, 32, 32


def shares(rounds: int) -> dict[str, float]:
    """Return the least milliseconds of CPU time of the loss of one of n processes, by n."""
    torch.manual_seed(0)
    queue, labels = FeatureQueue(ROWS, DIM, "xbn", labels=True), torch.randint(CLASSES, (ROWS,))
    rows = F.normalize(torch.randn(ROWS, DIM), dim=1)
    for batch, batch_labels in zip(rows.split(BATCH), labels.split(BATCH), strict=True):
        queue.adapt(batch)
        slots = queue.enqueue(batch, batch_labels)
    z, z_labels = F.normalize(torch.randn(BATCH, DIM), dim=1), torch.randint(CLASSES, (BATCH,))
    slots = queue.enqueue(z, z_labels)
    times: dict[str, list[float]] = {str(count): [] for count in COUNTS}
    for _ in range(rounds):
        for count in COUNTS:
            own = shard_slice(BATCH, (0, count))
            anchors = z[own].clone().requires_grad_()
            started = time.process_time()
            loss = sup_con(
                anchors,
                z_labels[own],
                queue,
                miner=PairMargin(),
                self_indices=slots[own],
                sum_counts=lambda counts: counts,
            )
            loss.backward()
            times[str(count)].append(1000 * (time.process_time() - started))
    return {count: round(min(values), 1) for count, values in times.items()}


def link(rounds: int) -> dict[str, float]:
    """Return the seconds of a step of two processes on a throttled link, by the way in which gradients are summed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        command = (
            f"ip link set lo mtu 1500 up && tc qdisc add dev lo root tbf rate {RATE} burst 256kb latency 50ms && "
            f"{sys.executable} -m experiments.benchmarks.processes two --rounds {rounds} --out {file}"
        )
        threads = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(["unshare", "--net", "sh", "-c", command], check=True, env={**os.environ, **threads})
        times: dict[str, float] = json.loads(file.read_text())
    return times


def two(rounds: int, file: Path) -> None:
    """Measure the steps in two processes of this network namespace."""
    context = torch.multiprocessing.get_context("spawn")
    children = [context.Process(target=_steps, args=(rank, rounds, file)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()


def _steps(rank: int, rounds: int, file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}.store", rank=rank, world_size=2)
    steps = {mode: _step(mode) for mode in MODES}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):  # the first round warms up
        for mode, step in steps.items():
            dist.barrier()
            started = time.perf_counter()
            step()
            if number:
                times[mode].append(time.perf_counter() - started)
    if rank == 0:
        file.write_text(json.dumps({mode: round(statistics.median(values), 3) for mode, values in times.items()}))


def _step(mode: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()) for _ in range(LAYERS)))
    images, parameters = torch.randn(IMAGES, WIDTH), [*model.parameters()]

    def loss() -> Tensor:
        return model(images).square().mean()

    def by_hand() -> None:
        loss().backward()
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        dist.all_reduce(flat)
        for parameter, values in zip(parameters, flat.split(WIDTH * WIDTH), strict=True):
            parameter.grad = values.view_as(parameter)

    summed = None if mode == "by hand" else GradientSum(model, parameters, mode)

    def step() -> None:
        model.zero_grad()
        if summed is None:
            by_hand()
        else:
            summed.backward(loss)

    return step


def views() -> dict[str, float]:
    """Return the share of all key views that a process sends to others in MoCo's shuffle, by number of processes."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (2, 4):
            context = torch.multiprocessing.get_context("fork")
            file = Path(folder) / f"{count}"
            children = [context.Process(target=_shuffled, args=(rank, count, file)) for rank in range(count)]
            for child in children:
                child.start()
            for child in children:
                child.join()
            found[str(count)] = float(file.read_text())
    return found


def _shuffled(rank: int, count: int, file: Path) -> None:
    dist.init_process_group("gloo", f"file://{file}.store", rank=rank, world_size=count)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    own, sent, exchange = shard_slice(BATCH), [], dist.all_to_all_single

    def counted(output: Tensor, input: Tensor, received: list[int], split: list[int]) -> Any:
        sent.append(sum(rows for other, rows in enumerate(split) if other != rank))
        return exchange(output, input, received, split)

    setattr(dist, "all_to_all_single", counted)  # noqa: B010
    shuffle(torch.zeros(own.stop - own.start, *SHUFFLED), order)
    if rank == 0:
        file.write_text(str(round(sent[0] / BATCH, 3)))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("shares", "link", "views", "two"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.name == "two":
        two(options.rounds, options.out)
        return
    measure: dict[str, Callable[[], dict[str, float]]]
    measure = {"shares": partial(shares, options.rounds), "link": partial(link, options.rounds), "views": views}
    result = {"measured": measure[options.name](), "rounds": options.rounds, "environment": environment()}
    (options.out / f"processes-{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["measured"]))


if __name__ == "__main__":
    main()
