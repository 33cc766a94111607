"""MoCo's step against the same step written out in plain tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightly.models.utils import update_momentum
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from selfsup_xbn import FeatureQueue
from selfsup_xbn.methods.moco import MoCo
from selfsup_xbn.models.encoder import Encoder


def encoder(norm=False):
    """A backbone of a few numbers, in float64 so that a step can be compared to many digits."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.ReLU())
    return Encoder(backbone, nn.Linear(16, 8), 16, 8).double()


def make(adaptation="xbn", size=32, norm=False, **kwargs):
    torch.manual_seed(1)
    return MoCo(encoder(norm), FeatureQueue(size, 8, adaptation, dtype=torch.float64), **kwargs)


def views(batch=6):
    return torch.randn(2, batch, 3, 4, 4, dtype=torch.float64).unbind()


LABELS = torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize("enqueue", ["before_loss", "after_loss"])
@pytest.mark.parametrize("normalize_first", [True, False])
@pytest.mark.parametrize("adaptation", ["xbm", "xbn"])
def test_step_is_the_papers_step_written_out(enqueue, normalize_first, adaptation):
    method = make(adaptation, enqueue=enqueue, normalize_first=normalize_first, temperature=0.2, momentum=0.9)
    query, key = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_k)
    rows = torch.zeros(0, 8, dtype=torch.float64)
    for _ in range(4):
        view_q, view_k = views()
        found = method((view_q, view_k), LABELS)

        update_momentum(query, key, 0.9)
        q, k = query(view_q), key(view_k).detach()
        k = F.normalize(k, dim=1) if normalize_first else k
        if adaptation == "xbn" and len(rows):
            rows = (rows - rows.mean(0)) / rows.std(0) * k.std(0) + k.mean(0)
        negatives = F.normalize(rows, dim=1)
        q, unit = F.normalize(q, dim=1), F.normalize(k, dim=1)
        logits = torch.cat([(q * unit).sum(1, keepdim=True), q @ negatives.T], dim=1) / 0.2
        if enqueue == "before_loss":
            others = (q @ unit.T / 0.2).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
            logits = torch.cat([logits, others], dim=1)
        expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
        rows = torch.cat([rows, k])[-32:]

        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for loss, module in ((found, method.encoder_q), (expected, query)):
            loss.backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        for a, b in zip(method.encoder_q.parameters(), query.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        for a, b in zip(method.encoder_k.parameters(), key.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_key_encoder_gets_no_gradient_and_own_statistics():
    method = make(norm=True)
    method(views(), LABELS).backward()
    assert all(parameter.grad is None for parameter in method.encoder_k.parameters())
    assert all(parameter.grad is not None for parameter in method.encoder_q.parameters())
    means = [module.running_mean for module in method.modules() if isinstance(module, nn.BatchNorm1d)]
    assert not torch.equal(*means)


def test_keys_are_shuffled_for_batch_norm_and_unshuffled():
    method = make(norm=True)
    seen = []
    method.encoder_k.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    _, view = views(64)
    keys = method.keys(view, 64)
    assert not torch.equal(seen[0], view)
    method.eval()
    expected = F.normalize(method.encoder_k.train()(view), dim=1)
    torch.testing.assert_close(keys, expected, rtol=1e-5, atol=1e-6)


def test_symmetric_step_enqueues_once_and_masks_own_keys():
    method = make("xbm", symmetric=True, temperature=0.5)
    view_a, view_b = views()
    found = method((view_a, view_b), LABELS)
    assert len(method.queue) == 12
    embed = lambda view, module: F.normalize(module(view), dim=1)  # noqa: E731
    qa, qb = embed(view_a, method.encoder_q), embed(view_b, method.encoder_q)
    ka, kb = embed(view_a, method.encoder_k), embed(view_b, method.encoder_k)
    own = torch.eye(6, dtype=torch.bool)

    def direction(q, k):
        keys = torch.cat([kb, ka])
        logits = (q @ keys.T / 0.5).masked_fill(torch.cat([own, own], dim=1), -torch.inf)
        positive = (q * k).sum(1, keepdim=True) / 0.5
        return F.cross_entropy(torch.cat([positive, logits], dim=1), torch.zeros(6, dtype=torch.int64))

    expected = (direction(qa, kb) + direction(qb, ka)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_momentum_schedule_ends_at_one():
    assert make(momentum=0.9).momentum_at(0.7) == 0.9
    method = make(momentum=0.9, momentum_schedule="cosine")
    assert method.momentum_at(0.0) == pytest.approx(0.9)
    assert method.momentum_at(0.5) == pytest.approx(0.95)
    assert method.momentum_at(1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_key_encoder_moves_the_same_by_a_tensor_as_by_a_number(momentum, dtype):
    by_number = make(momentum=momentum, momentum_schedule="cosine").to(dtype)
    with torch.no_grad():
        for parameter in by_number.encoder_q.parameters():
            parameter.add_(torch.randn_like(parameter))
    by_tensor = copy.deepcopy(by_number)
    for step in (0, 3, 9):
        by_number.update_key_encoder(by_number.momentum_at(step / 10))
        by_tensor.update_schedules(step, 10)
        by_tensor.update_key_encoder()
    for a, b in zip(by_tensor.encoder_k.parameters(), by_number.encoder_k.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the tensor is in float32


class Calls(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_captured_step_has_no_momentum_that_changes(schedule, capturing, monkeypatch):
    monkeypatch.setattr("selfsup_xbn.methods.moco.is_capturing", lambda tensor: capturing)
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    method = make(momentum_schedule=schedule).float()
    assert method.capturable
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), Calls() as calls:
        images = torch.rand(6, 3, 4, 4)
        loss = method.to_empty(device="cuda")((images, images), torch.zeros(6, dtype=torch.int64), 3, 10)
    assert loss.device.type == "cuda"
    by_tensor = schedule == "cosine"
    assert calls.names.count("aten._foreach_mul_.Tensor") == by_tensor
    assert calls.names.count("aten._foreach_lerp_.Scalar") == (not by_tensor)
    assert calls.names.count("aten.fill_.Scalar") == (by_tensor and not capturing)


def test_batch_larger_than_the_queue_works():
    method = make(size=4)
    assert method(views(), LABELS).isfinite()
    assert len(method.queue) == 4
