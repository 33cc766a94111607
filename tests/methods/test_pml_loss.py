"""Losses of pytorch-metric-learning in mode supervise: their parameters, their miners, and a trial before training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from integrations.memory_helpers import easiest
from pytorch_metric_learning.losses import MarginLoss, SupConLoss, TripletMarginLoss
from pytorch_metric_learning.miners import BatchEasyHardMiner
from torch import nn

from selfsup_xbn import FeatureQueue
from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.errors import UserError
from selfsup_xbn.methods import metric_learning
from selfsup_xbn.methods.metric_learning import MetricLearning, SupCon, make_loss
from selfsup_xbn.methods.pml_loss import PmlLoss
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.training.optimization import make_optimizer


def method_of(loss, size=60):
    torch.manual_seed(1)
    encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU()), nn.Linear(16, 8), 16, 8)
    return MetricLearning(encoder, FeatureQueue(size, 8, "xbm", labels=True) if size else None, loss)


def batch(rows=12, classes=3):
    return (torch.randn(rows, 3, 2, 2),), torch.arange(rows) % classes


def test_the_parameters_of_a_loss_are_trained_and_saved():
    config = SuperviseConfig(loss="MarginLoss", loss_args="learn_beta=True", miner="none", optimizer="sgd", lr=0.1)
    method = method_of(make_loss(config))
    optimizer, before = make_optimizer(config, method), method.loss.loss.beta.item()
    for _ in range(3):
        optimizer.zero_grad()
        method(*batch()).backward()
        optimizer.step()
    assert method.loss.loss.beta.item() != before
    other = method_of(make_loss(config))
    other.load_state_dict(method.state_dict())
    assert other.loss.loss.beta == method.loss.loss.beta != before
    assert not [name for name in method_of(PmlLoss(MarginLoss(), None)).state_dict() if name.startswith("loss")]


def test_the_gradient_of_a_loss_parameter_does_not_grow_with_the_processes(monkeypatch):
    method, (views, labels) = method_of(PmlLoss(MarginLoss(learn_beta=True), None)), batch()
    beta, slopes = method.loss.loss.beta, []
    for processes in (1, 4):
        monkeypatch.setattr(metric_learning, "world", lambda processes=processes: processes)
        twin = copy.deepcopy(method.queue.state_dict())
        slopes.append(processes * torch.autograd.grad(method(views, labels), beta)[0])  # gradients are summed
        method.queue.load_state_dict(twin)
    torch.testing.assert_close(*slopes)
    assert slopes[0].any()


def test_own_rows_are_left_out_before_mining():
    miner, loss = BatchEasyHardMiner(pos_strategy="easy", neg_strategy="hard"), TripletMarginLoss(0.5)
    method = method_of(PmlLoss(loss, miner))
    for _ in range(4):
        views, labels = batch()
        z = F.normalize(method.encoder(views[0]), dim=1)
        found, queue = method(views, labels), method.queue
        rows, row_labels = queue.features(), queue.labels[: len(queue)]
        own = torch.arange(len(queue) - 12, len(queue))
        expected = loss(z, labels, easiest(z, labels, rows, row_labels, own), rows, row_labels)
        assert found > 0
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("loss", [SupCon(0.1, None), PmlLoss(SupConLoss(), None)])
def test_labels_that_do_not_fit_are_named_before_the_queue_moves(loss):
    method, (views, labels) = method_of(loss), batch()
    method(views, labels)
    before = copy.deepcopy(method.queue.state_dict())
    for wrong in (labels[:5], torch.cat([labels, labels]), labels[:, None], labels + 0.5):
        with pytest.raises(ValueError, match="label"):
            method(views, wrong)
    assert all(torch.equal(value, before[name]) for name, value in method.queue.state_dict().items())
    assert torch.equal(method(views, labels.int()), method_after(before, loss)(views, labels))


def method_after(queue_state, loss):
    method = method_of(loss)
    method.queue.load_state_dict(queue_state)
    return method


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoder_of_zero_rows_has_a_finite_gradient(dtype):
    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((8, 12), 1e-9, dtype=dtype))  # rows underflow to zero

        def forward(self, images):
            return (images.flatten(1).to(dtype) @ self.weight.T) * 1e-9

    for loss in (SupCon(0.1, None), PmlLoss(SupConLoss(), None)):
        method = method_of(loss)
        method.encoder = Zero()
        value = method(*batch())
        value.backward()
        assert value.isfinite()
        assert method.encoder.weight.grad.isfinite().all()


TRIPLETS = {"loss": "TripletMarginLoss", "miner": "none"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (TRIPLETS | {"loss_args": "swap=True"}, "IndexError"),
        (TRIPLETS | {"loss_args": "margin=1e999"}, "finite loss"),
        (TRIPLETS | {"miner": "EmbeddingsAlreadyPackagedAsTriplets"}, "AssertionError"),
        ({"loss": "NTXentLoss", "loss_args": "distance=cosine", "miner": "none"}, "TypeError"),
        ({"loss": "MarginLoss", "loss_args": "num_classes=3,learn_beta=True", "miner": "none"}, "IndexError"),
        ({"miner": "AngularMiner", "miner_args": "distance=x"}, "does not accept"),
    ],
)
def test_a_loss_that_cannot_be_computed_is_found_by_a_trial(options, reason):
    with pytest.raises(UserError, match=reason) as error:
        method_of(make_loss(SuperviseConfig(**options))).try_loss(classes=10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            TRIPLETS | {"loss_args": "margn=0.1"},
            "--loss-args: TripletMarginLoss has no argument 'margn'; did you mean mar",
        ),
        (TRIPLETS | {"loss_args": "distanse=0.1"}, "'distanse'; did you mean distance?"),  # of a base class
        (TRIPLETS | {"loss_args": "zzz=1"}, "'zzz'; expected one of margin, swap, smooth_loss, triplets_per_anchor"),
        (
            {"loss": "TripletMarginLoss", "miner": "MultiSimilarityMiner", "miner_args": "epsilom=0.1"},
            "--miner-args: MultiSimilarityMiner has no argument 'epsilom'; did you mean epsilon?",
        ),
        ({"miner": "Foo"}, "got 'Foo'; choose from AngularMiner, BatchEasyHardMiner, "),
        ({"miner": "Foo"}, ", TripletMarginMiner, UniformHistogramMiner, none"),
    ],
)
def test_a_wrong_name_is_answered_with_those_that_exist(options, message):
    with pytest.raises(UserError) as error:
        make_loss(SuperviseConfig(**options))
    assert message in str(error.value)


def test_a_loss_that_needs_no_memory_is_tried_without_one():
    method_of(PmlLoss(TripletMarginLoss(swap=True), None), size=0).try_loss(classes=10)


def test_a_trial_changes_neither_the_method_nor_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    method = method_of(PmlLoss(MarginLoss(num_classes=10, learn_beta=True), BatchEasyHardMiner()))
    state = copy.deepcopy(method.state_dict())
    torch.manual_seed(0)
    method.try_loss(classes=10)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items())
    assert method.loss.loss.beta.grad is None


@pytest.mark.parametrize("temperature", ["nan", "1e999", "0", "-1", "True"])
@pytest.mark.parametrize("miner", ["none", "MultiSimilarityMiner"])
@pytest.mark.parametrize("loss", ["SupConLoss", "NTXentLoss"])
def test_a_temperature_that_is_none_is_refused(loss, miner, temperature):
    with pytest.raises(UserError, match="temperature: expected a number above 0"):
        make_loss(SuperviseConfig(loss=loss, miner=miner, loss_args=f"temperature={temperature}"))
