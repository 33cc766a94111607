"""Settings for all tests: repeatable, one thread a process, no leftovers."""

import os
import shutil
from pathlib import Path

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is defined

from hypothesis import settings
from matplotlib.figure import Figure

from selfsup_xbn.cli import main
from tests.command_line import SMALL

settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")
torch.set_num_threads(1)
torch.ones(
    1, requires_grad=True
).backward()  # after torch.export, a first backward pass starts threads that forbid forks


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


SAVE_PICTURE = Figure.savefig
Figure.savefig = lambda figure, path, **_: Path(path).touch()  # pictures take half of the time of a small run


@pytest.fixture
def pictures(monkeypatch):
    """Let matplotlib draw: in all other tests it writes empty files."""
    monkeypatch.setattr(Figure, "savefig", SAVE_PICTURE)


@pytest.fixture(scope="session")
def _finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([*SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def finished_run(_finished_run, tmp_path):
    """Return the folder of a copy of a finished run of ``SMALL``."""
    return shutil.copytree(_finished_run, tmp_path / "run")


@pytest.fixture
def unchecked(monkeypatch):
    """Switch off the check of shapes at run time: for many small steps, for torch.compile, and for our own checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
