"""Short trainings with CrossBatchMemory that stop at a checkpoint; run as a program, it goes on from one."""

import sys

import torch
from pytorch_metric_learning.losses import SupConLoss, TripletMarginLoss
from pytorch_metric_learning.miners import PairMarginMiner
from torch import nn

from selfsup_xbn import AXBN, CrossBatchMemory

KINDS = {
    "xbm, PML's way": lambda: CrossBatchMemory(TripletMarginLoss(), 4, 20, adaptation="xbm"),
    "axbn, blockwise": lambda: CrossBatchMemory(
        SupConLoss(), 4, 20, PairMarginMiner(), adaptation=AXBN(r=8.0, gain_interval=2)
    ),
    "xbn, float64": lambda: CrossBatchMemory(SupConLoss(), 4, 20, adaptation="xbn"),
}
"""Memories of 20 rows: nine batches of 6 pass their end twice."""


class Training:
    """Network, memory and optimizer, and the losses of the steps that were made."""

    def __init__(self, kind):
        self.dtype = torch.float64 if "float64" in kind else torch.float32
        self.network, self.memory = nn.Linear(5, 4, dtype=self.dtype), KINDS[kind]()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.3)
        self.losses = []

    def go(self, start, stop):
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(6, 5, generator=generator).to(self.dtype)
            labels = torch.randint(0, 3, (6,), generator=generator)
            loss = self.memory(self.network(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())

    def state(self):
        return {"network": self.network.state_dict(), "memory": self.memory.state_dict()}

    def load(self, state):
        self.network.load_state_dict(state["network"])
        self.memory.load_state_dict(state["memory"])


if __name__ == "__main__":
    path, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    results = {}
    for kind, state in torch.load(path, weights_only=True).items():
        training = Training(kind)
        training.load(state)
        training.go(start, stop)
        results[kind] = {"losses": training.losses, **training.state()}
    torch.save(results, path)
