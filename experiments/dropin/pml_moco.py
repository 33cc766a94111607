"""Train MoCo as in the PML notebook, with the CrossBatchMemory of PML and with the one of this package.

    -from pytorch_metric_learning.losses import CrossBatchMemory
    +from selfsup_xbn import CrossBatchMemory

    python -m experiments.dropin.pml_moco [--data digits | --data DIR] [--steps 100] [--double]

DIR contains DIR/train/CLASS/* and DIR/test/CLASS/*. As in the notebook, queries and keys form one batch, each image has
a unique label, ``enqueue_mask`` selects the keys, the keys are shuffled for BatchNorm, and the loss is NTXentLoss with
temperature 0.1 and key momentum 0.99. Keys and queries have unit norm.

All runs use the same weights, batches and views. With ``xbm`` the values equal PML's except for rounding, which
training amplifies in float32 within a few dozen steps. With --double the curves agree.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.moco_transform import MoCoV2Transform
from pytorch_metric_learning import losses as peer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import selfsup_xbn
from experiments.dropin.lightly_moco import DIM, SIDE, Transformed, report, seed_all, small_backbone, train_and_test


def run(memory: Callable[..., nn.Module], items: Any, args: argparse.Namespace) -> list[float]:
    """Train with a memory; return the loss of each step."""
    seed_all(args.seed)
    encoder_q = nn.Sequential(small_backbone(), nn.Linear(128, DIM)).to(args.dtype)
    encoder_k = copy.deepcopy(encoder_q)
    deactivate_requires_grad(encoder_k)
    loss_fn = memory(peer.NTXentLoss(temperature=0.1), DIM, args.memory)
    optimizer = torch.optim.SGD(encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    views = Transformed(items, list(range(len(items))), MoCoV2Transform(input_size=SIDE))
    loader = DataLoader(views, args.batch, shuffle=True, drop_last=True, num_workers=args.workers)

    losses: list[Tensor] = []
    next_label = 0
    while len(losses) < args.steps:
        for (x_q, x_k), _ in loader:
            update_momentum(encoder_q, encoder_k, m=0.99)
            q = F.normalize(encoder_q(x_q.to(args.dtype)), dim=1)
            shuffled = torch.randperm(len(x_k))
            with torch.no_grad():
                k = F.normalize(encoder_k(x_k[shuffled].to(args.dtype))[shuffled.argsort()], dim=1)
            labels = torch.arange(next_label, next_label + len(q)).repeat(2)
            enqueue_mask = torch.arange(len(labels)) >= len(q)
            next_label += len(q)
            loss = loss_fn(torch.cat([q, k]), labels, enqueue_mask=enqueue_mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if len(losses) == args.steps:
                break
    return torch.stack(losses).tolist()


def main() -> None:
    """Run the program with each memory and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or a folder with train/ and test/ (default digits)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    parser.add_argument("--batch", type=int, default=32, help="batch size (default 32)")
    parser.add_argument("--memory", type=int, default=512, help="rows of the memory (default 512)")
    parser.add_argument("--workers", type=int, default=0, help="workers of the data loader (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument(
        "--double", dest="dtype", action="store_const", const=torch.float64, default=torch.float32, help="use float64"
    )
    args = parser.parse_args()
    memories: dict[str, Callable[..., nn.Module]] = {
        "PML": peer.CrossBatchMemory,
        "xbm": partial(selfsup_xbn.CrossBatchMemory, adaptation="xbm"),
        "xbn": selfsup_xbn.CrossBatchMemory,
    }
    train, _ = train_and_test(args.data)
    report({name: run(memory, train, args) for name, memory in memories.items()}, max(1, args.steps // 10))


if __name__ == "__main__":
    main()
