"""A MoCo loop as lightly's users write it, on small random views.

python moco_program.py FOLDER    goes on from FOLDER/half.pt, compiles; saves what came of it
"""

import copy
import sys
from pathlib import Path

import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import distributed, nn

from selfsup_xbn import FeatureQueue, MemoryBankModule, NTXentLoss

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


def resumable_model():
    """The model of the test that stops half way."""
    torch.manual_seed(0)
    return MoCo(NTXentLoss(0.2, (20, DIM), adaptation="axbn"))


def distributed_model():
    """The model of the test of two processes: of each one, and of the one that they are compared with."""
    torch.manual_seed(0)
    return MoCo(NTXentLoss(0.2, (20, DIM), gather_distributed=True, adaptation="axbn"), normed=False)


def resume(folder):
    model = resumable_model()
    model.load_state_dict(torch.load(folder / "half.pt", weights_only=True))
    losses = train(model, range(STEPS // 2, STEPS), batch=6)
    torch.save({"losses": losses, "state": model.state_dict()}, folder / "whole.pt")


def train_in_two_processes(folder):
    fork = torch.multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, 2, folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


def run_rank(rank, world, folder):
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(distributed_model())
    losses = train(model, range(STEPS), batch=4 * world, part=slice(4 * rank, 4 * rank + 4))
    torch.save({"losses": losses, "state": model.module.state_dict()}, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


def compiled_and_eager(step, modules, backend):
    """What 20 steps return and leave, compiled without a graph break and as they are."""
    found = []
    for wrap in (lambda step: torch.compile(step, fullgraph=True, backend=backend), lambda step: step):
        torch.manual_seed(0)
        copies, values = copy.deepcopy(modules), []
        run = wrap(lambda *inputs, copies=copies: step(*copies, *inputs))
        parameters = list(copies.parameters())
        for _ in range(20):
            value = run(torch.randn(8, 5), torch.randn(8, 5))
            values.append(value.sum().item())
            if parameters:
                for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                    parameter.data -= 0.1 * gradient
        for queue in (module for module in copies.modules() if isinstance(module, FeatureQueue)):
            queue.refresh()  # which compiled code leaves to its owner
        found.append({"values": values, "state": copies.state_dict()})
    return found


def compare_compiled(folder):
    def step(encoder, criterion, x_query, x_key):
        with torch.no_grad():
            key = encoder(x_key)
        return criterion(encoder(x_query), key)

    modules = nn.ModuleList([nn.Linear(5, DIM), NTXentLoss(0.2, (50, DIM), adaptation="axbn")])
    bank = nn.ModuleList([MemoryBankModule((50, 5))])  # 20 batches of 8: the banks' end is passed three times
    torch.save(compiled_and_eager(step, modules, "aot_eager"), folder / "compiled_loss.pt")
    torch.save(
        compiled_and_eager(lambda bank, x, _: bank(x, update=True)[1], bank, "eager"), folder / "compiled_bank.pt"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for work in (resume, compare_compiled):
        work(Path(sys.argv[1]))
