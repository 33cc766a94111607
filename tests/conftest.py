"""Settings for all tests: repeatable, one thread a process, no leftovers."""

import jaxtyping
import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch):
    """No check of shapes at run time: for tests of many small steps, and for torch.compile, which cannot trace it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
