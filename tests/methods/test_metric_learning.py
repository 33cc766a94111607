"""The supervised step against PML's own loop, and what its options are made of."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss, TripletMarginLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner, PairMarginMiner
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from selfsup_xbn import FeatureQueue
from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.errors import UserError
from selfsup_xbn.losses import PairMargin, sup_con
from selfsup_xbn.methods.metric_learning import MetricLearning, SupCon, make_loss
from selfsup_xbn.methods.pml_loss import PmlLoss
from selfsup_xbn.models.encoder import Encoder


def make(adaptation="xbm", loss=None, size=40, **kwargs):
    torch.manual_seed(1)
    encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU()), nn.Linear(16, 8), 16, 8).double()
    queue = FeatureQueue(size, 8, adaptation, labels=True, dtype=torch.float64) if size else None
    return MetricLearning(encoder, queue, loss or SupCon(0.1, PairMargin()), **kwargs)


def batch(rows=12, classes=3):
    labels = torch.arange(rows) % classes
    centers = torch.randn(classes, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (centers[labels] + 0.5 * torch.randn(rows, 3, 2, 2, dtype=torch.float64),), labels


LOSSES = {
    "own": (SupCon(0.1, PairMargin()), SupConLoss(0.1), PairMarginMiner(0.2, 0.8)),
    "peer": (PmlLoss(TripletMarginLoss(0.3), MultiSimilarityMiner()), TripletMarginLoss(0.3), MultiSimilarityMiner()),
    "peer without miner": (PmlLoss(TripletMarginLoss(0.3), None), TripletMarginLoss(0.3), None),
}


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_with_xbm_training_is_pmls_training(name, weight):
    ours, loss, miner = LOSSES[name]
    method = make(loss=ours, batch_loss_weight=weight)
    encoder, memory = copy.deepcopy(method.encoder), CrossBatchMemory(loss, 8, 40, miner=miner)
    for _ in range(6):
        views, labels = batch()
        found = method(views, labels)
        z = F.normalize(encoder(views[0]), dim=1)
        expected = memory(z, labels)
        if weight:
            expected = expected + weight * loss(z, labels, miner(z, labels) if miner else None)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for value, module in ((found, method.encoder), (expected, encoder)):
            grads = torch.autograd.grad(value, list(module.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(module.parameters(), grads, strict=True):
                    parameter -= 0.1 * grad
    for a, b in zip(method.encoder.parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_peer_loss_masks_own_rows_of_a_batch_above_the_queue():
    method = make(loss=PmlLoss(TripletMarginLoss(0.3), None), size=8)
    views, labels = batch()
    found = method(views, labels)
    z = F.normalize(method.encoder(views[0]), dim=1)
    distance = torch.cdist(z, z.detach()[4:])
    terms = [
        F.relu(distance[a, p] - distance[a, n] + 0.3)
        for a in range(12)
        for p in range(8)
        for n in range(8)
        if labels[a] == labels[p + 4] and a != p + 4 and labels[a] != labels[n + 4]
    ]
    terms = torch.stack([term for term in terms if term > 0])
    torch.testing.assert_close(found, terms.mean(), rtol=1e-9, atol=1e-9)


def test_xbn_is_the_same_step_on_moved_rows():
    method = make("xbn")
    rows = torch.zeros(0, 8, dtype=torch.float64)
    labels_of_rows = torch.zeros(0, dtype=torch.int64)
    for _ in range(5):
        views, labels = batch()
        found = method(views, labels)
        z = F.normalize(method.encoder(views[0]), dim=1).detach()
        if len(rows):
            rows = (rows - rows.mean(0)) / rows.std(0) * z.std(0) + z.mean(0)
        rows, labels_of_rows = torch.cat([rows, z])[-40:], torch.cat([labels_of_rows, labels])[-40:]
        plain = FeatureQueue(40, 8, "xbm", labels=True, dtype=torch.float64)
        plain.enqueue(rows, labels_of_rows)
        own = torch.arange(len(rows) - len(z), len(rows))
        expected = sup_con(z, labels, plain, temperature=0.1, miner=PairMargin(), self_indices=own)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_the_moment_gradient_is_that_of_rows_that_move_with_the_batch(name):
    """PML's loss on Eq. 6 in plain autograd, through to the weights. Rows of the batch itself are constants."""
    ours, loss, miner = LOSSES[name]
    method, constants = (make("xbn", ours, moment_gradient=moment_gradient) for moment_gradient in (True, False))
    rows, row_labels = torch.zeros(0, 8, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    added = []
    for step in range(4):
        views, labels = batch()
        found, plain = method(views, labels), constants(views, labels)
        z = F.normalize(method.encoder(views[0]), dim=1)
        moved = (rows - rows.mean(0)) / rows.std(0) * z.std(0) + z.mean(0) if step else rows
        rows, row_labels = torch.cat([moved, z.detach()])[-40:], torch.cat([row_labels, labels])[-40:]
        pairs = miner(z, labels, rows, row_labels) if miner else lmu.get_all_pairs_indices(labels, row_labels)
        own = pairs[1] == len(rows) - len(z) + pairs[0]
        expected = loss(z, labels, (pairs[0][~own], pairs[1][~own], *pairs[2:]), rows, row_labels)
        rows = rows.detach()
        assert torch.equal(found, plain)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        gradients = [
            torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, list(module.parameters()))])
            for value, module in ((found, method), (expected, method), (plain, constants))
        ]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)
        added.append(((gradients[0] - gradients[2]).norm() / gradients[2].norm().clamp(min=1e-9)).item())
    assert max(added) > 0.1
    assert added[0] == 0  # the memory has rows of the batch only


def test_loss_is_the_batchs_without_or_before_the_memory():
    views, labels = batch()
    alone, waiting = (make(loss=SupCon(0.1, None), **kwargs) for kwargs in ({"size": 0}, {"memory_start": 3}))
    expected = SupConLoss(0.1)(F.normalize(alone.encoder(views[0]), dim=1), labels)
    torch.testing.assert_close(alone(views, labels), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(waiting(views, labels, 2, 10), expected, rtol=1e-9, atol=1e-9)
    assert len(waiting.queue) == 12
    assert waiting(views, labels, 3, 10) != expected


def test_head_stage_trains_the_head_alone():
    method = make()
    views, labels = batch()
    before = copy.deepcopy(method.encoder.backbone.state_dict())
    method.head_loss(views, labels).backward()
    assert all(parameter.grad is None for parameter in method.encoder.backbone.parameters())
    assert all(parameter.grad is not None for parameter in method.encoder.head.parameters())
    assert all(torch.equal(value, before[name]) for name, value in method.encoder.backbone.state_dict().items())


def test_losses_and_miners_by_name():
    config = SuperviseConfig()
    own = make_loss(config)
    assert isinstance(own, SupCon)
    assert own.miner == PairMargin(0.2, 0.8, "euclidean")
    assert make_loss(replace(config, miner="none")).miner is None
    assert make_loss(replace(config, miner_distance="cosine", miner_args="pos_margin=0.9")).miner == PairMargin(
        0.9, 0.8, "cosine"
    )
    peer = make_loss(
        replace(config, loss="TripletMarginLoss", loss_args="margin=0.4", miner="MultiSimilarityMiner", miner_args="")
    )
    assert isinstance(peer.loss, TripletMarginLoss)
    assert peer.loss.margin == 0.4
    assert isinstance(peer.miner, MultiSimilarityMiner)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "TripletMarginLos"}, "did you mean TripletMarginLoss"),
        ({"miner": "MultiSimilarityMine", "loss": "TripletMarginLoss"}, "did you mean MultiSimilarityMiner"),
        ({"loss": "TripletMarginLoss", "loss_args": "marign=1", "miner": "none"}, "marign"),
        ({"loss": "ArcFaceLoss"}, "'ArcFaceLoss'.*choose from"),
        ({"loss_args": "temperature=abc"}, "temperature: expected a number above 0, got 'abc'"),
        ({"loss_args": "temperature=0"}, "temperature: expected a number above 0, got 0"),
        ({"miner_args": "pos_margin=abc"}, "pos_margin: expected a number above 0, got 'abc'"),
        ({"miner_args": "margin=1"}, "'margin'"),
        ({"loss_args": "beta=1"}, "'beta'"),
    ],
)
def test_wrong_name_or_argument_is_named(change, message):
    with pytest.raises(UserError, match=message):
        make_loss(replace(SuperviseConfig(), **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queue_size": "120%"}, "--queue-size.*'120%'"),
        ({"queue_size": "many"}, "--queue-size.*'many'"),
        ({"queue_size": "-3"}, "--queue-size.*'-3'"),
        ({"recall_ks": "1,x"}, "--recall-ks.*'1,x'"),
        ({"loss_args": "nonsense"}, "--loss-args.*'nonsense'"),
        ({"batch_size": 30}, "--batch-size 30.*multiple"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        SuperviseConfig(**change)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("size", [0, 40])
@pytest.mark.parametrize("miner", [PairMargin(), None])
def test_step_of_the_own_loss_waits_for_no_cuda_device(size, weight, miner, monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    method = make("xbn", SupCon(0.1, miner), size, batch_loss_weight=weight).float()
    assert method.capturable
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):  # refuses to read a value
        labels = torch.zeros(12, dtype=torch.int64)
        loss = method.to_empty(device="cuda")((torch.rand(12, 3, 2, 2),), labels, 3, 10)
    assert (loss.device.type, loss.shape) == ("cuda", ())


def test_steps_that_may_differ_or_wait_are_not_captured():
    assert not make(memory_start=3).capturable
    assert not make(loss=PmlLoss(TripletMarginLoss(0.3), None)).capturable


def test_training_in_one_process_uses_the_kernels_of_the_loss(monkeypatch):
    kernels = pytest.importorskip("selfsup_xbn.losses.kernels", reason="Triton is not installed")
    calls, own = [], kernels.sup_con
    monkeypatch.setattr(kernels, "sup_con", lambda *arguments: (calls.append(arguments), own(*arguments))[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
    z, labels = torch.randn(12, 8, device=device), batch()[1].to(device)
    queue = FeatureQueue(40, 8, labels=True, device=device)
    slots, loss, values = queue.enqueue(z, labels), SupCon(0.1, PairMargin()), []
    for wanted in (False, True):
        monkeypatch.setattr("selfsup_xbn.losses.functional.has_kernels", lambda device, wanted=wanted: wanted)
        values.append(loss(z, labels, queue, slots))
        assert len(calls) == wanted
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
