"""A MoCo loop of the kind that lightly's users write, on small random views; run as a program, one process of a test.

python moco_program.py resume PATH             goes on from the state in PATH, and leaves what came of it there
python moco_program.py rank RANK WORLD FOLDER  trains under DistributedDataParallel, and saves what came of it
"""

import copy
import sys
from pathlib import Path

import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import distributed, nn

from selfsup_xbn import NTXentLoss

DIM, STEPS = 8, 14


def views(step, batch, dtype=torch.float32):
    """Two views of a batch of images; what a loader would give at this step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(batch, 3, 8, 8, generator=generator, dtype=dtype)
    return [images + 0.3 * torch.randn(images.shape, generator=generator, dtype=dtype) for _ in range(2)]


class MoCo(nn.Module):
    """Query encoder, key encoder that follows it, criterion."""

    def __init__(self, criterion, normed=True):
        super().__init__()
        torch.manual_seed(1)
        norm = nn.BatchNorm2d(8) if normed else nn.Identity()
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.query_encoder = nn.Sequential(backbone, MoCoProjectionHead(8, 16, DIM))
        self.key_encoder = copy.deepcopy(self.query_encoder)
        deactivate_requires_grad(self.key_encoder)
        self.criterion = criterion

    def forward(self, x_query, x_key):
        with torch.no_grad():
            key = self.key_encoder(x_key)
        return self.criterion(self.query_encoder(x_query), key)


def train(model, steps, batch, dtype=torch.float32, part=slice(None)):
    """Loss of each step. ``part`` is the share of the batch that this process sees."""
    moco = getattr(model, "module", model)
    optimizer = torch.optim.SGD(moco.query_encoder.parameters(), lr=0.2)
    losses = []
    for step in steps:
        update_momentum(moco.query_encoder, moco.key_encoder, m=0.9)
        loss = model(*(view[part] for view in views(step, batch, dtype)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def distributed_model():
    """The model of the test of several processes: of each one, and of the one that it is compared with."""
    torch.manual_seed(0)
    return MoCo(NTXentLoss(0.2, (20, DIM), gather_distributed=True, adaptation="axbn"), normed=False)


def resume(path):
    state = torch.load(path, weights_only=True)
    model = MoCo(NTXentLoss(0.2, (20, DIM), adaptation=state["adaptation"]))
    model.load_state_dict(state["model"])
    losses = train(model, range(STEPS // 2, STEPS), batch=6)
    torch.save({"losses": losses, "model": model.state_dict()}, path)


def run_rank(rank, world, folder):
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(distributed_model())
    losses = train(model, range(STEPS), batch=4 * world, part=slice(4 * rank, 4 * rank + 4))
    torch.save({"losses": losses, "model": model.module.state_dict()}, Path(folder, f"rank{rank}.pt"))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "resume":
        resume(sys.argv[2])
    else:
        run_rank(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
