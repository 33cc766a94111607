from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from selfsup_xbn import FeatureQueue
from selfsup_xbn.evaluation import FeatureDrift, moment_gap
from selfsup_xbn.memory.moments import Moments, batch_moments


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 5))


@pytest.fixture
def images():
    return torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def embed(encoder, images):
    """Unit embeddings in float64, in eval mode."""
    modes = encoder.training
    raw = encoder.eval()(images).detach().double()
    encoder.train(modes)
    return raw / raw.square().sum(1, keepdim=True).sqrt()


def test_drift_equals_equation_5_over_training_steps(encoder, images):
    drift, optimizer = FeatureDrift(encoder, images), torch.optim.SGD(encoder.parameters(), lr=0.5)
    assert drift.update() is None
    previous = embed(encoder, images)
    for _ in range(3):
        encoder(torch.randn(8, 3, 2, 2)).square().sum().backward()
        optimizer.step()
        current = embed(encoder, images)
        distances = (current - previous).square().sum(1).sqrt()
        moved = drift.update()
        assert moved.mean.item() == pytest.approx(distances.mean().item(), rel=1e-4)
        assert moved.maximum.item() == pytest.approx(distances.max().item(), rel=1e-4)
        assert moved.maximum > moved.mean > 1e-3
        previous = current


def test_no_step_is_no_drift(encoder, images):
    drift = FeatureDrift(encoder, images)
    drift.update()
    assert drift.update() == (0, 0)


def test_opposite_embeddings_drift_by_the_diameter(images):
    signs = iter([1.0, -3.0])
    drift = FeatureDrift(lambda x: next(signs) * x.flatten(1), images)
    drift.update()
    assert drift.update() == pytest.approx((2, 2))


def test_update_leaves_modes_statistics_and_gradients_alone(encoder, images):
    encoder[1].eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    modes = [part.training for part in encoder.modules()]
    drift = FeatureDrift(encoder, images)
    drift.update()
    assert not drift.update().mean.requires_grad
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def moments(mean, std):
    return Moments(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))


def test_gap_is_in_units_of_the_batch_and_in_logarithms():
    gap = moment_gap(moments([4.0, 1.0], [2.0, 0.5]), moments([0.0, 1.0], [1.0, 1.0]))
    assert gap.mean.item() == pytest.approx(math.sqrt((4**2 + 0**2) / 2))
    assert gap.std.item() == pytest.approx(math.log(2))


def test_constant_dimensions_do_not_count():
    gap = moment_gap(moments([3.0, 9.0, 9.0], [1.0, 0.0, 1.0]), moments([1.0, 0.0, 0.0], [1.0, 1.0, 0.0]))
    assert gap == pytest.approx((2, 0))
    assert torch.tensor(moment_gap(moments([1.0], [0.0]), moments([1.0], [1.0]))).isnan().all()


def test_xbn_closes_the_gap_and_xbm_leaves_it():
    generator = torch.Generator().manual_seed(2)
    old, new = torch.randn(50, 4, generator=generator), 2 + 3 * torch.randn(20, 4, generator=generator)
    target = batch_moments(new)
    gaps = {}
    for adaptation in ("xbm", "xbn"):
        queue = FeatureQueue(64, 4, adaptation)
        queue.enqueue(old)
        queue.adapt(new)
        gaps[adaptation] = moment_gap(queue.moments(), target)
    torch.testing.assert_close(torch.stack(gaps["xbn"]), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(torch.stack(gaps["xbm"]), torch.stack(moment_gap(batch_moments(old), target)))
    assert gaps["xbm"].mean > 0.3
    assert gaps["xbm"].std > 0.5
