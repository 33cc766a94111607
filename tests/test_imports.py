"""What is imported when: libraries are loaded where they are used, and every public name is there."""

import subprocess
import sys
from multiprocessing import get_context

import pytest

import selfsup_xbn
from tests.command_line import PRETRAIN

TINY = ["--limit-train", "64", "--batch-size", "16", "--queue-size", "32", "--epochs", "1", "--knn-k", "5"]


def loaded(code):
    """The top-level modules that a Python process has loaded after ``code``."""
    code += "\nimport sys\nprint('loaded:', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].removeprefix("loaded: ").split())


@pytest.mark.slow
def test_a_moco_run_loads_no_library_that_it_does_not_use(tmp_path):
    command = [*PRETRAIN, *TINY, "--out", str(tmp_path)]
    modules = loaded(f"from selfsup_xbn.cli import main\nassert main({command!r}) == 0")
    assert {"torch", "selfsup_xbn"} <= modules
    assert modules.isdisjoint({"pytorch_metric_learning", "lightly", "timm"})


def test_help_loads_no_torch():
    code = """
import contextlib, sys
from selfsup_xbn.cli import main
for command in ([], ["pretrain"], ["supervise"], ["evaluate"], ["evaluate", "knn"]):
    with contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert "torch" not in sys.modules, command
"""
    assert "torch" not in loaded(code)


CORE = "from selfsup_xbn import FeatureQueue, MetricLearning, MoCo, info_nce, recall_at_k, sup_con"
OTHERS = {"pytorch_metric_learning", "lightly", "timm", "matplotlib", "sklearn"}


def loaded_again(code, packages):
    """Which packages a fork of this process loads for ``code`` after it has forgotten them. Torch stays loaded."""

    def load(end):
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]
        exec(code, {})
        end.send({name.partition(".")[0] for name in sys.modules} & packages)

    here, there = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=load, args=(there,))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def test_the_queue_and_the_losses_import_no_other_library(unchecked):
    packages = OTHERS | {"selfsup_xbn"}
    assert loaded_again(CORE, packages) == {"selfsup_xbn"}
    assert loaded_again("import pytorch_metric_learning", packages) == {"pytorch_metric_learning"}


@pytest.mark.slow
def test_the_queue_and_the_losses_load_no_other_library():
    assert loaded(CORE).isdisjoint(OTHERS)


def test_every_public_name_is_there():
    for name in selfsup_xbn.__all__:
        assert getattr(selfsup_xbn, name) is not None
    assert set(selfsup_xbn.__all__) <= set(dir(selfsup_xbn))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = selfsup_xbn.nonsense
