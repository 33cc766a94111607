"""The drop-ins for lightly compiled, saved, copied, resumed, distributed, in a LightningModule and under autocast."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lightly.loss
import numpy as np
import pytest
import torch
from integrations.lightly_helpers import assert_same_state, pair, seeded, state
from integrations.moco_program import (
    DIM,
    STEPS,
    MoCo,
    distributed_model,
    resumable_model,
    train,
    train_in_two_processes,
)
from torch import nn

import selfsup_xbn
from selfsup_xbn import NTXentLoss

PeerLoss = lightly.loss.NTXentLoss


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What the program beside this file makes in a process of its own: name -> results."""
    folder = tmp_path_factory.mktemp("elsewhere")
    model = resumable_model()
    train(model, range(STEPS // 2), batch=6)
    torch.save(model.state_dict(), folder / "half.pt")
    env = os.environ | {"PYTHONPATH": str(Path(selfsup_xbn.__file__).parents[1])}
    program = Path(__file__).with_name("moco_program.py")
    subprocess.run([sys.executable, program, folder], env=env, check=True, timeout=200)
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled_loss", "compiled_bank"])
def test_compiled_step_has_no_graph_break_and_equals_eager(elsewhere, name):
    # Not in this process: the annotations' checks, which a user does not have, cannot be compiled.
    compiled, eager = elsewhere[name]
    assert compiled["values"] == pytest.approx(eager["values"], abs=1e-5)
    assert_same_state(compiled["state"], eager["state"], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ saving, copying


def test_the_bank_survives_a_state_dict():
    saved, loaded = (NTXentLoss(0.1, (20, DIM), adaptation="axbn") for _ in range(2))
    for _ in range(3):
        saved(*pair())
    loaded.load_state_dict(saved.state_dict())
    for _ in range(3):
        given = pair()
        assert torch.equal(saved(*given), loaded(*given))
    assert_same_state(state(saved), state(loaded))


def test_checkpoint_of_lightly_loads_and_keeps_the_bank():
    ours, peer = (nn.ModuleDict({"net": nn.Linear(3, 3), "loss": make(0.1, (8, 3))}) for make in (NTXentLoss, PeerLoss))
    before = state(ours["loss"])
    ours.load_state_dict(peer.state_dict())
    assert torch.equal(ours["net"].weight, peer["net"].weight)
    assert_same_state(before, state(ours["loss"]))
    peer.load_state_dict(ours.state_dict(), strict=False)


def test_a_part_of_a_bank_or_a_bank_of_another_size_is_refused():
    saved = NTXentLoss(0.1, (8, 3)).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        NTXentLoss(0.1, (9, 3)).load_state_dict(saved)
    del saved["memory_bank.queue.written"]
    with pytest.raises(RuntimeError, match=r"Missing key.*written"):
        NTXentLoss(0.1, (8, 3)).load_state_dict(saved)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_go_on_alike_and_apart(clone):
    criterion = NTXentLoss(0.1, (20, DIM), adaptation="axbn")
    criterion(*pair())
    copied, given = clone(criterion), pair()
    assert torch.equal(criterion(*given), copied(*given))
    assert_same_state(state(criterion), state(copied))
    criterion(*pair())
    assert not torch.equal(criterion.memory_bank.bank, copied.memory_bank.bank)


@pytest.mark.slow
def test_going_on_in_a_fresh_process_is_not_having_stopped(elsewhere):
    model = resumable_model()
    losses = train(model, range(STEPS), batch=6)
    assert elsewhere["whole"]["losses"] == losses[STEPS // 2 :]
    assert_same_state(elsewhere["whole"]["state"], state(model))


@pytest.mark.usefixtures("unchecked")
def test_two_processes_that_gather_are_one_with_the_whole_batch(tmp_path):
    train_in_two_processes(tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same_state(ranks[0]["state"], ranks[1]["state"])
    whole = distributed_model()
    losses = train(whole, range(STEPS), batch=8)
    np.testing.assert_allclose(np.mean([rank["losses"] for rank in ranks], axis=0), losses, rtol=1e-4)
    assert_same_state(ranks[0]["state"], state(whole), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module_goes_on_from_its_checkpoint(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.moco = MoCo(NTXentLoss(0.2, (20, DIM)), normed=False)

        def training_step(self, batch):
            return self.moco(*batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.moco.query_encoder.parameters(), lr=0.1)

    def fit(module, epochs, checkpoint=None):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet)
        data = torch.randn(4, 2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=checkpoint, weights_only=True)
        return trainer

    whole, first, rest = Module(), Module(), Module()
    rest.load_state_dict(first.state_dict())
    whole.load_state_dict(first.state_dict())
    fit(whole, 2)
    fit(first, 1).save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, 2, tmp_path / "half.ckpt")
    assert int(rest.moco.criterion.memory_bank.queue.pointer) == 8 * 6 % 20
    assert_same_state(state(rest), state(whole))


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_more_than_its_inputs_are_rounded(dtype):
    criterion = NTXentLoss(0.1, (32, DIM))
    exact, encoder = copy.deepcopy(criterion), nn.Linear(DIM, DIM)
    for _ in range(6):
        x_query, x_key = torch.randn(8, DIM), torch.randn(8, DIM)
        with torch.autocast("cpu", dtype):
            q, k = encoder(x_query), encoder(x_key).detach()
            loss = criterion(q, k)
        assert q.dtype == dtype
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact(q.float(), k.float()), rtol=1e-5, atol=1e-5)
        loss.backward()
    assert encoder.weight.grad.isfinite().all()
    assert_same_state(state(criterion), state(exact), rtol=1e-5, atol=1e-5)


def test_casts_of_the_module_leave_the_bank_alone():
    criterion = NTXentLoss(0.1, (32, DIM))
    given, before = pair(dtype=torch.float64), state(criterion)
    assert_same_state(state(criterion.half().double()), before)
    assert criterion(*given).dtype == torch.float64


def test_a_bank_in_bfloat16_takes_half_and_loses_two_digits():
    exact, half = (seeded(NTXentLoss, 0.1, (64, DIM), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for _ in range(20):
        given = pair()
        torch.testing.assert_close(half(*given), exact(*given), rtol=1e-2, atol=1e-2)
    assert half.memory_bank.queue.rows.element_size() == 2
