"""Compiled queue steps beside eager ones, as JSON: how often was compiled again, and how far the two are apart."""

import json

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from selfsup_xbn import FeatureQueue

M, B, D, STEPS = 32, 6, 3, 60


def step(queue, batch, labels):
    queue.adapt(batch)
    return queue.enqueue(batch, labels)


def compare(adaptation):
    """Take the same steps both ways; the owner of the compiled step calls ``refresh`` where the eager queue does."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    eager, owned = (FeatureQueue(M, D, adaptation, labels=True) for _ in range(2))
    offered, difference, same_slots, compilations = 0, 0.0, True, 0
    for _ in range(STEPS):
        batch, labels = torch.randn(B, D) * torch.rand(D).exp() + torch.randn(D), torch.randint(0, 9, (B,))
        if offered >= M:
            owned.refresh()
            offered = 0
        slots = compiled(owned, batch, labels)
        offered += B
        compilations = compilations or counter.frame_count  # of the first step
        same_slots &= torch.equal(slots, step(eager, batch, labels))
        difference = max(difference, (owned.features() - eager.features()).abs().max().item())
    same_labels, same_count = torch.equal(owned.labels, eager.labels), torch.equal(owned.offered, eager.offered)
    return {
        "recompilations": counter.frame_count - compilations,
        "difference": difference,
        "same": same_slots and same_labels and same_count,
    }


if __name__ == "__main__":
    print(json.dumps({adaptation: compare(adaptation) for adaptation in ("xbm", "xbn", "axbn")}))
