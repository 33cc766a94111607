"""The blockwise losses against plain matrices in float64, lightly and PML."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
from pytorch_metric_learning.miners import PairMarginMiner
from torch.utils._python_dispatch import TorchDispatchMode

from selfsup_xbn import FeatureQueue
from selfsup_xbn.errors import UserError
from selfsup_xbn.losses import PairMargin, info_nce, nt_xent, online, sup_con
from selfsup_xbn.losses import pairs as queue_reader
from selfsup_xbn.losses.blockwise import class_reader, scan_negative_pairs

CENTRES = torch.randn(6, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LOSSES = {"sup_con": sup_con, "nt_xent": nt_xent}
TEMPERATURES = (0.1, 0.04)  # the exponentials of all logits can be summed as they are; not so


@pytest.fixture(autouse=True, params=[7, 1024], ids=["small blocks", "one block"])
def _block_rows(request, monkeypatch):
    monkeypatch.setattr(queue_reader, "block_rows", lambda anchors, queue: request.param)


@pytest.fixture(params=["few", "few pairs", "many", "accelerator"])
def path(request, monkeypatch):
    """A CPU where rows of the batch's classes count as few, or as many; an accelerator: no shape depends on values.

    Few rows of the batch's classes leave plain negatives, of which the miner's may count as few or as many.
    """
    if request.param.startswith("few"):
        monkeypatch.setattr(queue_reader, "FEW", 0)
        monkeypatch.setattr(queue_reader, "FEW_PAIRS", 0 if request.param == "few pairs" else math.inf)
    if request.param == "accelerator":
        monkeypatch.setattr(queue_reader, "may_wait", lambda tensor: False)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def draw(n, dtype=torch.float64, noise=0.7):
    labels = torch.randint(0, len(CENTRES), (n,))
    return (CENTRES[labels] + noise * torch.randn(n, 12, dtype=torch.float64)).to(dtype), labels


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def filled_queue(rows, size=60, adaptation="xbm", labels=True, dtype=torch.float64):
    queue = FeatureQueue(size, 12, adaptation, labels=labels, dtype=dtype)
    for _ in range(rows // 15):
        z, y = draw(15)
        queue.adapt(z)
        queue.enqueue(z, y if labels else None)
    return queue


@pytest.mark.parametrize("rows", [0, 45, 60, 90])
@pytest.mark.parametrize("adaptation", ["xbm", "xbn"])
def test_info_nce_equals_cross_entropy_over_the_whole_matrix(rows, adaptation, path):
    queue = filled_queue(rows, adaptation=adaptation, labels=False)
    q, k = torch.randn(2, 10, 12, dtype=torch.float64).requires_grad_().unbind()
    queue.adapt(k)
    slots = queue.enqueue(k.detach())
    found = info_nce(q, k, queue, 0.2, slots)
    logits = F.normalize(q, dim=1) @ F.normalize(queue.features(), dim=1).T / 0.2  # own key's column is the positive
    expected = F.cross_entropy(logits.detach().clone().requires_grad_(), slots)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    logits = F.normalize(q, dim=1) @ F.normalize(queue.features(), dim=1).T / 0.2
    torch.testing.assert_close(gradient(found, q), gradient(F.cross_entropy(logits, slots), q), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_info_nce_leaves_out_all_of_an_anchors_self_indices(path, temperature):
    queue = filled_queue(45, labels=False)
    q, k = torch.randn(2, 4, 12, dtype=torch.float64).unbind()
    own = torch.stack([queue.enqueue(k), queue.enqueue(torch.randn(4, 12, dtype=torch.float64))], dim=1)
    own[2, 1] = -1
    cosine = F.normalize(q, dim=1) @ F.normalize(queue.features(), dim=1).T / temperature
    for anchor, slot in itertools.product(range(4), range(2)):
        if own[anchor, slot] >= 0:
            cosine[anchor, own[anchor, slot]] = -torch.inf
    positive = F.cosine_similarity(q, k) / temperature
    expected = F.cross_entropy(torch.cat([positive[:, None], cosine], dim=1), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(info_nce(q, k, queue, temperature, own), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.03, 0.07, 0.5])
def test_info_nce_with_xbm_equals_lightlys_with_the_same_bank(temperature):
    theirs = NTXentLoss(temperature, memory_bank_size=(64, 12))
    queue = FeatureQueue(64, 12, "xbm")
    queue.enqueue(theirs.memory_bank.bank)
    q, k = torch.randn(16, 12, requires_grad=True), torch.randn(16, 12, requires_grad=True)
    found, expected = info_nce(q, k, queue, temperature), theirs(q, k)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(found, q, k), gradient(expected, q, k), rtol=1e-5, atol=1e-6)


MINERS = {
    "none": (None, None),
    "euclidean": (PairMargin(0.7, 1.1), PairMarginMiner(0.7, 1.1)),
    "paper": (PairMargin(), PairMarginMiner(0.2, 0.8)),
    "cosine": (PairMargin(0.7, 0.3, "cosine"), PairMarginMiner(0.7, 0.3, distance=CosineSimilarity())),
}


def peers_loss(queue, miner, z, y, batch, temperature):
    """PML's loss on a copy of the queue, whose rows at the end it writes again with the very same values."""
    memory = CrossBatchMemory(SupConLoss(temperature), 12, queue.size, miner=miner)
    memory.embedding_memory, memory.label_memory = queue.features().clone(), queue.labels[: len(queue)].clone()
    memory.embedding_memory = F.pad(memory.embedding_memory, (0, 0, 0, queue.size - len(queue)))
    memory.label_memory = F.pad(memory.label_memory, (0, queue.size - len(queue)))
    memory.queue_idx, memory.has_been_filled = (int(queue.pointer) - batch) % queue.size, len(queue) == queue.size
    return memory(z, y)


@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("rows", [0, 15, 45, 60, 90])
def test_sup_con_equals_pmls_value_and_gradient(rows, miner, path):
    ours, theirs = MINERS[miner]
    for lonely, temperature in itertools.product((False, True), TEMPERATURES):
        queue = filled_queue(rows)
        z, y = draw(15)
        if lonely:  # single-member classes and anchors without positives
            y[:4] = torch.arange(100, 104)
        slots = queue.enqueue(z, y)
        z.requires_grad_()
        expected = peers_loss(queue, theirs, z, y, 15, temperature)
        found = sup_con(z, y, queue, temperature=temperature, miner=ours, self_indices=slots)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradient(found, z), gradient(expected, z), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("kept", "products"), [(1 / 8, 1), (1 / 40, 0), (0, 0)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_kept_negatives_are_not_multiplied_with_all_others(kept, products, temperature, dtype, monkeypatch):
    monkeypatch.setattr(queue_reader, "block_rows", lambda anchors, queue: 2**12)
    queue = FeatureQueue(4096, 12, "xbm", labels=True, dtype=dtype)
    queue.enqueue(torch.randn(4096, 12, dtype=dtype), torch.arange(4096))
    z, y = torch.randn(8, 12, dtype=dtype), torch.full((8,), -1)  # negatives only
    anchors = F.normalize(z, dim=1).requires_grad_()
    cosine = F.normalize(z.double(), dim=1) @ F.normalize(queue.features().double(), dim=1).T
    ordered = cosine.flatten().sort().values
    rank = round(len(ordered) * (1 - kept))
    margin = float(ordered[max(rank - 1, 0) : rank + 1].mean()) if kept else 1.01  # between two cosines
    miner = PairMargin(0.0, margin, "cosine")
    made, add = [], online.LogSumExp.add
    monkeypatch.setattr(online.LogSumExp, "add", lambda *given: (made.append(given), add(*given)))
    reader = class_reader(queue, temperature, None, PairMargin.rule(miner, y))
    found, number = scan_negative_pairs(anchors, reader)
    weights = torch.where(cosine > margin, cosine / temperature, -torch.inf)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found.double(), weights.logsumexp(1).clamp(min=online.FLOOR), **close)
    rows = F.normalize(queue.features().double(), dim=1)
    by_anchor = weights.softmax(1).nan_to_num() @ rows / temperature
    torch.testing.assert_close(gradient(found.sum(), anchors)[0].double(), by_anchor, **close)
    assert torch.equal(number, (cosine > margin).sum(1))
    assert len(made) == products


@pytest.mark.parametrize("miner", MINERS)
def test_sup_con_in_the_batch_equals_pmls_with_gradient_to_both_sides(miner):
    ours, theirs = MINERS[miner]
    z, y = draw(20)
    z.requires_grad_()
    expected = SupConLoss(0.1)(z, y, theirs(z, y) if theirs else None)
    found = sup_con(z, y, temperature=0.1, miner=ours)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(found, z), gradient(expected, z), rtol=1e-7, atol=1e-9)


def test_sup_con_is_zero_with_a_finite_gradient_where_there_is_nothing_to_learn(path):
    for labels in (torch.zeros(8, dtype=torch.int64), torch.arange(8)):  # no negatives; no positives
        queue = FeatureQueue(8, 12, "xbm", labels=True)
        z = torch.randn(8, 12, requires_grad=True)
        loss = sup_con(z, labels, queue, self_indices=queue.enqueue(z, labels))
        (found,) = gradient(loss, z)
        assert loss.item() == 0
        assert torch.equal(found, torch.zeros_like(z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_and_autocast_give_the_float32_loss_of_the_same_values(dtype):
    queue = filled_queue(60, adaptation="xbn", dtype=torch.float32)
    z, y = draw(15, dtype)
    z.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = sup_con(z, y, queue), info_nce(z, z.detach().flip(0), queue)
    exact = z.detach().float().requires_grad_()
    expected = sup_con(exact, y, queue), info_nce(exact, exact.detach().flip(0), queue)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient(a, z)[0].float(), gradient(b, exact)[0], rtol=2e-2, atol=2e-3)


def test_small_temperatures_neither_overflow_nor_vanish():
    queue = filled_queue(60, labels=False)
    q, k = torch.randn(2, 5, 12, dtype=torch.float64).unbind()
    logits = F.normalize(q, dim=1) @ F.normalize(queue.features(), dim=1).T / 1e-3
    positive = F.cosine_similarity(q, k) / 1e-3
    expected = (torch.cat([positive[:, None], logits], dim=1).logsumexp(1) - positive).mean()
    found = info_nce(q.float(), k.float(), queue, 1e-3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


def test_the_gradient_passes_gradcheck():
    queue = filled_queue(60, adaptation="xbn")
    z, y = draw(6)
    k = z + 1
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sup_con(z, y, queue, temperature=0.3), (z,))
    assert torch.autograd.gradcheck(lambda z: info_nce(z, k, queue, 0.3), (z,))


def test_bad_settings_are_named():
    queue = filled_queue(60)
    z, y = draw(4)
    with pytest.raises(UserError, match=r"temperature above 0, got 0\.0"):
        info_nce(z, z, queue, 0.0)
    with pytest.raises(UserError, match="'manhattan'"):
        sup_con(z, y, queue, miner=PairMargin(distance="manhattan"))
    with pytest.raises(ValueError, match="labels=True"):
        sup_con(z, y, filled_queue(15, labels=False))


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a program wait for an accelerator: reading a value, and shapes that depend on values."""

    WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = [a for a in args[1] if a is not None and a.dtype == torch.bool] if "index." in str(function) else []
        assert function not in self.WAITS, function
        assert not masks, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("adaptation", ["xbm", "xbn", "axbn"])
def test_no_step_waits_for_the_device(adaptation, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # takes the path of an accelerator
    queue = FeatureQueue(60, 12, adaptation, labels=True)
    z, y = draw(25, torch.float32)
    z.requires_grad_()
    with NoWaiting():
        for _ in range(4):
            queue.adapt(z)
            slots = queue.enqueue(z, y)
            loss = info_nce(z, z.detach(), queue, 0.1, slots) + sup_con(
                z, y, queue, miner=PairMargin(), self_indices=slots
            )
            loss.backward()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            len(queue)


def test_what_is_refused_there_is_what_waits():
    for waits in (lambda t: t.sum().item(), lambda t: t.nonzero(), lambda t: t[t > 0]):
        with NoWaiting(), pytest.raises(AssertionError):
            waits(torch.ones(3))


@pytest.mark.parametrize("loss", ["info_nce", "sup_con", "nt_xent"])
def test_float16_gradients_survive_a_loss_scale(loss):
    queue = filled_queue(60)
    z, y = draw(15)

    def scaled_gradient(dtype, scale):
        leaf = z.to(dtype).requires_grad_()
        value = info_nce(leaf, z.roll(1, 0), queue) if loss == "info_nce" else LOSSES[loss](leaf, y, queue)
        return gradient(value * scale, leaf)[0].double() / scale

    expected = scaled_gradient(torch.float32, 1.0)
    torch.testing.assert_close(
        scaled_gradient(torch.float16, 65536.0), expected, rtol=0.02, atol=2e-3 * expected.abs().max()
    )


@pytest.mark.parametrize("length", [1e-20, 1e-13, 1e-12, 2e-12, 1e15])
def test_gradients_of_embeddings_of_any_length_are_those_of_normalize(length):
    queue, (z, y) = filled_queue(60), draw(15)
    z = (F.normalize(z, dim=1) * length).requires_grad_()
    found = gradient(sup_con(z, y, queue), z)[0]
    logits = F.normalize(z, dim=1) @ F.normalize(queue.features(), dim=1).T / 0.1
    same = (y[:, None] == queue.labels).double()
    expected = gradient((logits.logsumexp(1) - (logits * same).sum(1) / same.sum(1)).mean(), z)[0]
    torch.testing.assert_close(found * length, expected * length, rtol=1e-6, atol=1e-9)
