"""Inputs for which a loss was silently wrong: every loss, every implementation, against autograd and the peers."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from pytorch_metric_learning import losses as peer

from selfsup_xbn import FeatureQueue, MemoryBankModule
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.knn import knn_classify
from selfsup_xbn.evaluation.retrieval import recall_at_k, retrieval_metrics
from selfsup_xbn.losses import PairMargin, info_nce, nt_xent, sup_con

D = 6
PAIRS = PairMargin(0.1, 1.9)


def draw(rows=9, classes=3):
    return torch.randn(rows, D, dtype=torch.float64), torch.arange(rows) % classes


def queue_of(rows=30):
    queue = FeatureQueue(40, D, "xbm", labels=True, dtype=torch.float64)
    queue.enqueue(*draw(rows))
    return queue


LOSSES = {
    "info_nce": lambda z, y, queue, **kwargs: info_nce(z, z.detach().flip(0), queue, **kwargs),
    "sup_con": lambda z, y, queue, **kwargs: sup_con(z, y, queue, **kwargs),
    "sup_con with a miner": lambda z, y, queue, **kwargs: sup_con(z, y, queue, miner=PAIRS, **kwargs),
    "sup_con in the batch": lambda z, y, queue, **kwargs: sup_con(z, y, **kwargs),
    "nt_xent": lambda z, y, queue, **kwargs: nt_xent(z, y, queue, **kwargs),
    "nt_xent with a miner": lambda z, y, queue, **kwargs: nt_xent(z, y, queue, miner=PAIRS, **kwargs),
}
LABELED = [name for name in LOSSES if name != "info_nce"]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_learnable_temperature_has_the_gradient_of_a_difference_quotient(loss):
    queue, (z, y) = queue_of(), draw()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for shape in ((), (1,)):
        value = LOSSES[loss](z, y, queue, temperature=temperature.reshape(shape))
        assert value.shape == ()
        (slope,) = torch.autograd.grad(value, temperature)
        ends = [LOSSES[loss](z, y, queue, temperature=0.3 + step) for step in (-1e-6, 1e-6)]
        torch.testing.assert_close(slope, (ends[1] - ends[0]) / 2e-6, rtol=1e-6, atol=1e-7)
    if loss != "sup_con in the batch":
        with pytest.raises(UserError, match="number as temperature"):
            LOSSES[loss](z, y, queue, temperature=temperature, implementation="blockwise")


def test_a_learnable_temperature_of_nt_xent_equals_pmls():
    queue, (z, y) = queue_of(), draw()
    slopes, rest = [], (None, queue.features(), queue.labels[: len(queue)])
    for make in (lambda t: nt_xent(z, y, queue, temperature=t), lambda t: peer.NTXentLoss(t)(z, y, *rest)):
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        slopes.append(torch.autograd.grad(make(temperature), temperature)[0])
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("temperature", [math.nan, math.inf, 0.0, -0.1])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_temperature_that_is_none_is_refused_as_number_and_tensor(loss, temperature):
    queue, (z, y) = queue_of(), draw()
    for value in (temperature, torch.tensor(temperature)):
        with pytest.raises(UserError, match="temperature above 0"):
            LOSSES[loss](z, y, queue, temperature=value)
    with pytest.raises(UserError, match="one element"):
        LOSSES[loss](z, y, queue, temperature=torch.ones(3))


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_embedding_that_is_not_finite_gives_nan_as_the_peers_do(loss, bad, implementation):
    queue, (z, y) = queue_of(), draw()
    z[2, 1] = bad
    z.requires_grad_()
    value = LOSSES[loss](z, y, queue, implementation=implementation)
    assert value.isnan()
    assert torch.autograd.grad(value, z)[0][2].isnan().any()
    bank = NTXentLoss(0.1, memory_bank_size=(16, D)).double()
    assert bank(z, z.detach().flip(0)).isnan()
    for theirs in (peer.NTXentLoss(), peer.SupConLoss()):
        assert theirs(z, y).isnan()


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_zeros_have_a_gradient_of_zero(loss, dtype, implementation):
    queue, (z, y) = queue_of(), draw()
    z = z.to(dtype)
    z[1], z[5] = 0, 0
    z.requires_grad_()
    value = LOSSES[loss](z, y, queue, implementation=implementation)
    (slope,) = torch.autograd.grad(value * 1024, z)
    assert value.isfinite()
    assert slope.isfinite().all()
    assert not slope[[1, 5]].any()
    assert slope[[0, 2, 3]].any()


LABELS = (torch.int32, torch.uint8, torch.int16, torch.float32, torch.float64)
READERS = {
    "FeatureQueue": lambda z, y: FeatureQueue(40, D, labels=True).enqueue(z, y),
    "recall_at_k": lambda z, y: recall_at_k(z, y, ks=(1, 2)),
    "recall_at_k of a gallery": lambda z, y: recall_at_k(z, torch.arange(len(z)) % 3, z.flip(0), y),
    "retrieval_metrics": lambda z, y: retrieval_metrics(z, y),
    "knn_classify": lambda z, y: knn_classify(z, z, y, num_classes=3, k=2, exclude_self=True),
    **{name: lambda z, y, loss=LOSSES[name]: loss(z, y, queue_of()) for name in LABELED},
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("reader", READERS)
def test_labels_of_any_dtype_are_the_same_and_fractions_are_refused(reader):
    z, y = draw()
    for dtype in LABELS:
        results = []
        for labels in (y, y.to(dtype)):
            torch.manual_seed(1)
            results.append(READERS[reader](z, labels))
        assert str(results[0]) == str(results[1])
    torch.manual_seed(1)
    two = READERS[reader](z, y % 2)
    torch.manual_seed(1)
    assert str(READERS[reader](z, y % 2 == 1)) == str(two)
    for bad in (0.5, math.nan, math.inf, 1e30):
        wrong = y.double()
        wrong[3] = bad
        with pytest.raises(ValueError, match=r"whole numbers as .*labels"):
            READERS[reader](z, wrong)
    for shaped in (y[:, None], y[:-1], torch.cat([y, y[:1]])):
        with pytest.raises(ValueError, match="label"):
            READERS[reader](z, shaped)


@pytest.mark.usefixtures("unchecked")
def test_a_refused_batch_leaves_the_queue_as_it_was():
    queue = FeatureQueue(20, D, "xbn", labels=True)
    queue.enqueue(*draw(8))
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    z, y = draw(5)
    for batch, labels in ((z[0], y), (z.long(), y), (z[:, :3], y), (z, y[:3]), (z, y[:, None]), (z, y + 0.5)):
        with pytest.raises(ValueError, match="expected"):
            queue.enqueue(batch, labels)
    for batch in (z[0], z.long(), z[:, :3]):
        with pytest.raises(ValueError, match="expected"):
            queue.adapt(batch)
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())


def test_info_nce_against_an_empty_queue_is_zero_and_against_one_row_is_not():
    z, _ = draw()
    queue = FeatureQueue(8, D, "xbm", dtype=torch.float64)
    z.requires_grad_()
    value = info_nce(z, z.detach().flip(0), queue)
    assert value.item() == 0
    assert not torch.autograd.grad(value, z)[0].any()
    queue.enqueue(torch.randn(1, D, dtype=torch.float64))
    assert info_nce(z, z.detach().flip(0), queue) > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_queue_refuses_the_recomputation_of_a_checkpoint(reentrant):
    queue, bank = FeatureQueue(20, D), MemoryBankModule((20, D))
    z = torch.randn(4, D, requires_grad=True)

    def by_queue(z):
        queue.adapt(z)
        queue.enqueue(z)
        return info_nce(z, z.detach().flip(0), queue)

    def by_bank(z):
        return F.cross_entropy(z @ bank(z, update=True)[1], torch.zeros(4, dtype=torch.int64))

    for step in (by_queue, by_bank):
        loss = torch.utils.checkpoint.checkpoint(step, z, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint computes again"):
            loss.backward()
    assert len(queue) == 4


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "sup_con in the batch"])
@pytest.mark.parametrize(("slot", "columns"), [(40, 1), (-2, 1), (40, 2)])
def test_own_slots_outside_the_queue_are_refused(loss, slot, columns, monkeypatch):
    queue, (z, y) = queue_of(), draw()
    indices = torch.tensor([0, 39, -1, 3, 4, 5, 6, 7, 8])[:, None].repeat(1, columns)
    LOSSES[loss](z, y, queue, self_indices=indices)
    indices[4, -1] = slot
    with pytest.raises(ValueError, match=rf"expected self_indices in \[-1, 40\), got .*{slot}\b"):
        LOSSES[loss](z, y, queue, self_indices=indices)
    LOSSES[loss](z[:0], y[:0], queue, self_indices=indices[:0])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # takes the path of an accelerator
    LOSSES[loss](z, y, queue, self_indices=indices)
