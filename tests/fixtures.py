"""Settings and fixtures for all tests: repeatable, one thread a process, no leftovers."""

import contextlib
import gc
import os
import shutil
from functools import partial

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is defined

# The import hook of jaxtyping hides the bytecode of all modules that a module of the package imports first.
import sklearn.datasets  # noqa: F401
import torch._dynamo
import torchvision  # noqa: F401
from hypothesis import settings
from matplotlib.figure import Figure

from selfsup_xbn.cli import main
from selfsup_xbn.commands import train
from selfsup_xbn.report import thumbnails
from tests.command_line import SMALL

settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")
torch.set_num_threads(1)
torch.ones(
    1, requires_grad=True
).backward()  # after torch.export, a first backward pass starts threads that forbid forks


def pytest_collection_finish():
    """Spare the garbage collector, and the pages that processes share after a fork, what is there for all tests."""
    gc.enable()
    gc.collect()
    gc.freeze()


# torch.manual_seed keeps a formatted stack of each call until CUDA is initialized.
SEED = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _seed():
    SEED(0)


@contextlib.contextmanager
def without_checks():
    """Switch off the check of shapes at run time where ``unchecked`` cannot: for a module, or in hypothesis's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


SAVE_PICTURE, PLANE_OF = Figure.savefig, thumbnails.plane_of
DRAW_CURVES, DRAW_GALLERY = train.draw_curves, train.draw_gallery
# Plots and t-SNE take more time than a small run.
Figure.savefig = lambda figure, file, **_: None
train.draw_curves = lambda folder: (folder / "curves.png").touch()
train.draw_gallery = lambda folder, *_: (folder / "retrieval.png").touch()
thumbnails.plane_of = lambda embeddings: embeddings[:, :2].sigmoid()
os.fsync = lambda descriptor: None  # no test cuts the power


@pytest.fixture
def plots(monkeypatch):
    """Let runs lay out their plots, in files that stay empty: in all other tests they only create the files."""
    monkeypatch.setattr(train, "draw_curves", DRAW_CURVES)
    monkeypatch.setattr(train, "draw_gallery", partial(DRAW_GALLERY, rows=4, nearest=3))


@pytest.fixture
def pictures(plots, monkeypatch):
    """Let matplotlib draw: in all other tests it writes empty files."""
    monkeypatch.setattr(Figure, "savefig", SAVE_PICTURE)


@pytest.fixture
def maps(monkeypatch):
    """Let t-SNE place the images of a map: in all other tests the first two dimensions do."""
    monkeypatch.setattr(thumbnails, "plane_of", PLANE_OF)


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
def unchecked():
    """Switch off the check of shapes at run time: for many small steps, for torch.compile, and for our own checks."""
    with without_checks():
        yield
