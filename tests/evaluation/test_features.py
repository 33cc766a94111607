from __future__ import annotations

import pytest
import torch
from torch import nn

from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation import extract_features


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture
def images():
    return torch.randn(10, 3, 8, 8)


def test_equals_one_pass_in_eval_mode_in_order(network, images):
    features = extract_features(network, images.split(3))
    torch.testing.assert_close(features, network.eval()(images).detach())


def test_modes_of_all_parts_come_back(network, images):
    network.train()
    network[1].eval()  # a frozen BatchNorm
    before = [part.training for part in network.modules()]
    extract_features(network, [images])
    assert [part.training for part in network.modules()] == before
    assert len(set(before)) == 2


def test_modes_come_back_after_an_error(network):
    with pytest.raises(RuntimeError):
        extract_features(network, [torch.randn(2, 1, 8, 8)])
    assert all(part.training for part in network.modules())


def test_running_statistics_stay(network, images):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    extract_features(network, [images])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_method_of_a_module_runs_in_eval_mode(images):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def features(self, images):
            assert not self.norm.training
            return self.norm(images).flatten(1)

    encoder = Encoder()
    extract_features(encoder.features, [images])
    assert encoder.norm.training


def test_plain_function_and_half_precision_give_float32(images):
    features = extract_features(lambda x: x.flatten(1).bfloat16(), images.split(4))
    assert features.dtype == torch.float32
    assert torch.equal(features, images.flatten(1).bfloat16().float())


def test_features_can_be_trained_on(network, images):
    features = extract_features(network, [images])
    probe = nn.Linear(4, 2)
    probe(features).sum().backward()
    torch.testing.assert_close(probe.weight.grad[0], features.sum(0))


def test_no_images_is_an_error(network):
    with pytest.raises(UserError, match="at least one batch of images, got none"):
        extract_features(network, [])
