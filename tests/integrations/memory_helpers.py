"""Embeddings, and our memory beside PML's, for the tests of CrossBatchMemory."""

import copy

import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.miners import MultiSimilarityMiner, PairMarginMiner, TripletMarginMiner

from selfsup_xbn import CrossBatchMemory

M, D = 24, 4
MINERS = {
    "no miner": lambda: None,
    "pair margin": PairMarginMiner,
    "multi-similarity": MultiSimilarityMiner,
    "triplet margin": TripletMarginMiner,
}
BLOCKWISE = [peer.SupConLoss, peer.NTXentLoss]


def draw(rows, classes=3, dtype=torch.float64):
    """Embeddings near their class's center, with a gradient, and labels."""
    centers = torch.randn(classes, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    labels = torch.randint(0, classes, (rows,))
    embeddings = centers[labels] + torch.randn(rows, D, dtype=torch.float64)
    return embeddings.to(dtype).requires_grad_(), labels


def both(loss, miner=None, **kwargs):
    """Our memory and PML's, around copies of one loss and one miner."""
    ours = CrossBatchMemory(copy.deepcopy(loss), D, M, copy.deepcopy(miner), adaptation="xbm", **kwargs)
    return ours, peer.CrossBatchMemory(loss, D, M, miner, **kwargs)


def assert_equal_step(ours, theirs, embeddings, labels, *args, **kwargs):
    """One step of each: same value, same gradient, same memory."""
    expected = theirs(embeddings, labels, *args, **kwargs)
    found = ours(embeddings, labels, *args, **kwargs)
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(loss, embeddings)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    for name in ("embedding_memory", "label_memory", "curr_batch_idx"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)
    assert (ours.queue_idx, ours.has_been_filled) == (theirs.queue_idx, theirs.has_been_filled)
    return found.item()


def easiest(embeddings, labels, rows, row_labels, own):
    """Triplets of the nearest other row of the class and the nearest row of another class, anchor by anchor."""
    z, r = F.normalize(embeddings.detach()), F.normalize(rows)
    triplets = []
    for a in range(len(z)):
        distance = (z[a] - r).norm(dim=1)
        same = row_labels == labels[a]
        same[own[a]] = False
        others = row_labels != labels[a]
        if same.any() and others.any():
            p = torch.where(same, distance, torch.inf).argmin()
            n = torch.where(others, distance, torch.inf).argmin()
            triplets.append((a, int(p), int(n)))
    return tuple(torch.tensor(index) for index in zip(*triplets, strict=True))
