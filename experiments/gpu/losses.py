"""Time queue step and loss on a CUDA device, beside their peers, and check the gradient.

    python -m experiments.gpu.losses OUT.json

MoCo: InfoNCE beside plain MoCo, lightly and inf-cl. Supervised: SupCon with a pair margin miner beside PyTorch Metric
Learning. Each line has the median time of one call, launched by the host and replayed from a CUDA graph. The line above
them has the relative error of our gradient against float64. That of SupCon is measured without the miner, because pairs
at a margin are kept in one precision and dropped in the other. ``high`` in a name is
``torch.set_float32_matmul_precision("high")``; all other lines have torch's default, "highest".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.steps import T, moco_inputs, supervised_inputs
from selfsup_xbn import FeatureQueue, info_nce
from selfsup_xbn.losses import PairMargin, sup_con
from selfsup_xbn.runs.environment import environment

SIZES = ((128, 4096, 128), (256, 65536, 128), (512, 4096, 128))
"""Batch, rows of the queue, dimensions."""
SUPERVISED = ((64, 29775, 512), (64, 200_000, 512))
MINER = PairMargin()


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of the function."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def microseconds(function: Callable[[], Any]) -> float:
    """Return the median time of a call."""
    from triton.testing import do_bench

    return 1e3 * do_bench(function, return_mode="median")


def reference_gradient(q: Tensor, k: Tensor, queue: FeatureQueue, slots: Tensor) -> Tensor:
    """Return the gradient of InfoNCE by the queries, from one matrix of similarities in float64."""
    q64 = q.detach().double().requires_grad_()
    unit, rows = F.normalize(q64, dim=1), F.normalize(queue.features().double(), dim=1)
    positive = (unit * F.normalize(k.double(), dim=1)).sum(1, keepdim=True) / T
    negative = (unit @ rows.T / T).scatter(1, slots[:, None], -torch.inf)
    loss = (torch.cat([positive, negative], 1).logsumexp(1) - positive[:, 0]).mean()
    return torch.autograd.grad(loss, q64)[0]


def at_precision(precision: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """Return the function with another precision of float32 products."""

    def call() -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return function()
        finally:
            torch.set_float32_matmul_precision(before)

    return call


def supervised_functions(batch: int, rows: int, dim: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return the calls of the supervised step by name, and the relative error of our gradient."""
    from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
    from pytorch_metric_learning.miners import PairMarginMiner

    embeddings, labels, memory, memory_labels = (tensor.cuda() for tensor in supervised_inputs(batch, rows, dim))
    z, labels = embeddings[0].clone().requires_grad_(), labels[0]
    queue, plain_queue = (FeatureQueue(rows, dim, name, labels=True, device="cuda") for name in ("xbn", "xbm"))
    for each in (queue, plain_queue):
        each.enqueue(memory, memory_labels)

    def ours(each: FeatureQueue, miner: PairMargin | None = MINER, implementation: str = "auto") -> Tensor:
        each.adapt(z)
        slots = each.enqueue(z, labels)
        loss = sup_con(z, labels, each, temperature=T, miner=miner, self_indices=slots, implementation=implementation)
        return torch.autograd.grad(loss, z)[0]

    peer = CrossBatchMemory(SupConLoss(T), dim, rows, PairMarginMiner(0.2, 0.8)).cuda()
    peer.embedding_memory, peer.label_memory = memory.clone(), memory_labels.clone()
    peer.has_been_filled = True
    gradient = ours(queue, miner=None)
    double = FeatureQueue(rows, dim, "xbm", labels=True, dtype=torch.float64, device="cuda")
    slots = torch.arange(batch, device="cuda")
    double.enqueue(queue.features().double(), queue.labels)
    z64 = z.detach().double().requires_grad_()
    loss = sup_con(z64, labels, double, temperature=T, self_indices=slots)
    expected = torch.autograd.grad(loss, z64)[0]
    calls: dict[str, Callable[[], Any]] = {
        "read the queue once": lambda: queue.rows.sum(),
        "queue step and loss, XBN": lambda: ours(queue),
        "queue step and loss, XBM": lambda: ours(plain_queue),
        "queue step and loss, XBN, high": at_precision("high", lambda: ours(queue)),
        "queue step and loss, XBM, high": at_precision("high", lambda: ours(plain_queue)),
        "the same without kernels, XBN": lambda: ours(queue, implementation="blockwise"),
        "the same without kernels, XBN, high": at_precision("high", lambda: ours(queue, implementation="blockwise")),
        "pytorch-metric-learning": lambda: torch.autograd.grad(peer(z, labels), z)[0],
    }
    return calls, ((gradient - expected).norm() / expected.norm()).item()


def functions(batch: int, rows: int, dim: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return the calls to time by name, and the relative error of our gradient."""
    queries, keys, memory = (tensor.cuda() for tensor in moco_inputs(batch, rows, dim))
    q, k = queries[0].clone().requires_grad_(), keys[0]
    queue, plain_queue = (FeatureQueue(rows, dim, name, device="cuda") for name in ("xbn", "xbm"))
    for each in (queue, plain_queue):
        each.enqueue(memory)
    transposed, target = memory.T.contiguous(), torch.zeros(batch, dtype=torch.long, device="cuda")

    def step(each: FeatureQueue) -> Tensor:
        each.adapt(k)
        return each.enqueue(k)

    def ours(each: FeatureQueue) -> Tensor:
        return torch.autograd.grad(info_nce(q, k, each, T, step(each)), q)[0]

    def plain() -> Tensor:
        positive = (q * k).sum(1, keepdim=True)
        loss = F.cross_entropy(torch.cat([positive, q @ transposed.clone()], 1) / T, target)
        transposed[:, :batch] = k.T
        return torch.autograd.grad(loss, q)[0]

    slots = step(queue)
    gradient = torch.autograd.grad(info_nce(q, k, queue, T, slots), q)[0]
    expected = reference_gradient(q, k, queue, slots)
    calls: dict[str, Callable[[], Any]] = {
        "queue step, XBN": lambda: step(queue),
        "queue step, XBM": lambda: step(plain_queue),
        "queue step and loss, XBN": lambda: ours(queue),
        "queue step and loss, XBM": lambda: ours(plain_queue),
        "queue step and loss, XBN, high": at_precision("high", lambda: ours(queue)),
        "queue step and loss, XBM, high": at_precision("high", lambda: ours(plain_queue)),
        "plain MoCo": plain,
        "plain MoCo, high": at_precision("high", plain),
        "info_nce alone": lambda: torch.autograd.grad(info_nce(q, k, queue, T, slots), q)[0],
    }
    try:
        from lightly.loss import NTXentLoss

        criterion = NTXentLoss(T, memory_bank_size=(rows, dim)).cuda()
        calls["lightly"] = lambda: torch.autograd.grad(criterion(q, k), q)[0]
    except ImportError as error:
        print(f"lightly is left out: {error}")
    try:
        from inf_cl import cal_flash_loss

        own = torch.arange(batch, device="cuda")
        calls["inf-cl, TF32"] = lambda: torch.autograd.grad(
            cal_flash_loss(q, torch.cat([k, memory]), own, scale=1 / T, head_dim=dim).mean(), q
        )[0]
    except ImportError as error:
        print(f"inf-cl is left out: {error}")
    return calls, ((gradient - expected).norm() / expected.norm()).item()


def main() -> None:
    """Time every call at every size; write and print the results."""
    results: list[dict[str, Any]] = []
    for sizes in (*SIZES, *SUPERVISED):
        calls, error = (functions if sizes in SIZES else supervised_functions)(*sizes)
        print(
            f"batch {sizes[0]}, queue {sizes[1]:,} x {sizes[2]}: relative error of the gradient {error:.1e}", flush=True
        )
        for name, function in calls.items():
            result: dict[str, Any] = {"sizes": sizes, "name": name, "eager_us": microseconds(function)}
            try:
                result["graph_us"] = microseconds(captured(function))
            except RuntimeError as reason:  # lightly's bank waits for the device
                result["graph_us"], result["no_graph"] = None, str(reason).splitlines()[0]
                torch.cuda.synchronize()
            results.append(result)
            graph = "no graph" if result["graph_us"] is None else f"{result['graph_us']:9.1f} us"
            print(f"    {name:<28}{result['eager_us']:9.1f} us   graph {graph}", flush=True)
        text = json.dumps({"results": results, "environment": environment()}, indent=1)
        Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()
