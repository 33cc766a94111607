"""The code of integrations/README.md, and what it says of training loops."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
import torch.nn.functional as F
from lightly.loss import DirectCLRLoss
from torch import nn

import selfsup_xbn
from selfsup_xbn import FeatureQueue, MemoryBankModule, info_nce

M, D, B, T = 20, 6, 5, 0.2
GUIDE = (Path(selfsup_xbn.__file__).parent / "integrations" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


def run(block, adaptation="xbm", **names):
    """Execute a block of the guide, and return its names."""
    space = {"torch": torch, "F": F, "nn": nn, "FeatureQueue": FeatureQueue, "info_nce": info_nce, **names}
    exec(block.replace('"xbn"', f'"{adaptation}"'), space)
    return space


def unit(rows):
    return F.normalize(torch.randn(rows, D), dim=1)


def cross_entropy(q, k, rows):
    """The loss of both libraries: the positive logit first, then those of the queue."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ rows.T], dim=1) / T
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def test_the_recipe_of_moco_is_mocos_loss_with_xbm_and_adapts_with_xbn():
    _, start, step, *_ = BLOCKS
    plain, adapted = SimpleNamespace(T=T), SimpleNamespace(T=T)
    for self, adaptation in ((plain, "xbm"), (adapted, "xbn")):
        run(start, adaptation, self=self, K=M, dim=D)
    rows, slot = plain.queue.features().clone(), 0
    for _ in range(9):
        given = {"q": unit(B).requires_grad_(), "k": unit(B), "concat_all_gather": lambda tensor: tensor}
        loss = run(step, self=plain, **given)["loss"]
        torch.testing.assert_close(loss, cross_entropy(given["q"], given["k"], rows))
        rows[slot : slot + B], slot = given["k"], (slot + B) % M
        assert run(step, "xbn", self=adapted, **given)["loss"].isfinite()
    assert adapted.queue.skipped == 0
    assert not torch.allclose(adapted.queue.features(), plain.queue.features())


def test_the_recipe_of_solo_learn_is_its_loss_with_xbm():
    *_, start, step = BLOCKS
    self = SimpleNamespace(temperature=T)
    run(start, self=self, queue_size=M, proj_output_dim=D)
    rows, slot = [queue.features().clone() for queue in self.queues], 0
    for _ in range(9):
        q1, q2, k1, k2 = (unit(B) for _ in range(4))
        loss = run(step, self=self, q1=q1, q2=q2, k1=k1, k2=k2, gather=lambda tensor: tensor)["nce_loss"]
        expected = (cross_entropy(q1, k2, rows[1]) + cross_entropy(q2, k1, rows[0])) / 2
        torch.testing.assert_close(loss, expected)
        rows[0][slot : slot + B], rows[1][slot : slot + B] = k1, k2
        slot = (slot + B) % M


def test_the_recipe_of_lightly_builds_its_loss():
    criterion = run(BLOCKS[0], DirectCLRLoss=DirectCLRLoss, MemoryBankModule=MemoryBankModule)["criterion"]
    assert criterion(torch.randn(4, 100, requires_grad=True), torch.randn(4, 100)).isfinite()


@pytest.mark.filterwarnings("ignore")
def test_a_queue_passes_through_a_distributed_checkpoint(tmp_path):
    saved, loaded = (FeatureQueue(M, D, "axbn") for _ in range(2))
    batches = [unit(B) for _ in range(12)]
    for batch in batches[:6]:
        saved.adapt(batch)
        saved.enqueue(batch)
    distributed_checkpoint.save(saved.state_dict(), checkpoint_id=tmp_path)
    state = loaded.state_dict()
    distributed_checkpoint.load(state, checkpoint_id=tmp_path)
    loaded.load_state_dict(state)
    for batch, queue in itertools.product(batches[6:], (saved, loaded)):
        queue.adapt(batch)
        queue.enqueue(batch)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())
