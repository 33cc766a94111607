"""Inputs and comparisons of the tests of the drop-ins for lightly."""

import torch
from integrations.moco_program import DIM


def pair(batch=8, dim=DIM, dtype=torch.float32, key_grad=False):
    """Queries and keys that have something to do with each other."""
    images = torch.randn(batch, dim, dtype=dtype) + 0.5
    keys = (images + 0.3 * torch.randn_like(images)).requires_grad_(key_grad)
    return images.clone().requires_grad_(), keys


def seeded(make, *args, **kwargs):
    torch.manual_seed(3)
    return make(*args, **kwargs)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(a, b, rtol=0.0, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
