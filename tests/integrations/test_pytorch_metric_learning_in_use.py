"""CrossBatchMemory where PML's is at fault, and as part of programs."""

import argparse
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integrations.memory_helpers import BLOCKWISE, MINERS, D, M, assert_equal_step, both, draw
from integrations.memory_program import KINDS, Training
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.miners import MultiSimilarityMiner, PairMarginMiner, TripletMarginMiner
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn

from selfsup_xbn import AXBN, CrossBatchMemory
from selfsup_xbn.errors import UserError


@pytest.mark.parametrize("loss", [*BLOCKWISE, peer.ContrastiveLoss])
@pytest.mark.parametrize("miner", [None, MultiSimilarityMiner(), TripletMarginMiner()])
def test_a_batch_of_one_does_not_meet_itself(loss, miner):
    memory = CrossBatchMemory(loss(), D, M, miner, adaptation="xbm")
    past, past_labels = draw(7)
    memory(past, past_labels)
    one = past_labels[:1]
    embedding = torch.randn(1, D, dtype=torch.float64, requires_grad=True)
    found = memory(embedding, one)
    indices = miner and miner(embedding, one, past, past_labels)
    expected = loss()(embedding, one, indices, past.detach(), past_labels)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", peer.CrossBatchMemory.supported_losses())
def test_mask_without_rows_leaves_an_empty_memory_empty(loss):
    memory = CrossBatchMemory(getattr(peer, loss)(), D, M, MultiSimilarityMiner())
    embeddings, labels = draw(6)
    found = memory(embeddings, labels, enqueue_mask=torch.zeros(6, dtype=torch.bool))
    assert found.item() == 0
    assert torch.equal(torch.autograd.grad(found, embeddings)[0], torch.zeros_like(embeddings))
    assert (memory.queue_idx, memory.has_been_filled, len(memory.queue)) == (0, False, 0)
    found = memory(embeddings, labels, enqueue_mask=torch.ones(6, dtype=torch.bool))  # and one without anchors
    assert found.item() == 0
    assert torch.equal(torch.autograd.grad(found, embeddings)[0], torch.zeros_like(embeddings))
    assert len(memory.queue) == 6


@pytest.mark.parametrize("loss", [peer.SupConLoss(), peer.ContrastiveLoss()])
def test_masked_oversize_batch_keeps_its_last_rows_once(loss):
    memory = CrossBatchMemory(loss, D, 10, adaptation="xbm")
    memory(*draw(4))
    embeddings, labels = draw(40)
    mask = torch.rand(40) < 0.6
    found = memory(embeddings, labels, enqueue_mask=mask)
    kept, kept_labels = embeddings[mask][-10:].detach(), labels[mask][-10:]
    assert memory.curr_batch_idx[-10:].tolist() == [(4 + i) % 10 for i in range(10)]
    assert torch.equal(memory.embedding_memory[memory.curr_batch_idx[-10:]], kept)
    assert torch.equal(memory.label_memory[memory.curr_batch_idx[-10:]], kept_labels)
    expected = loss(embeddings[~mask], labels[~mask], None, kept, kept_labels)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_oversize_batch_meets_its_last_rows_and_not_itself():
    for loss in (peer.SupConLoss(), peer.ContrastiveLoss()):
        memory = CrossBatchMemory(loss, D, 10, adaptation="xbm")
        embeddings, labels = draw(16)
        found = memory(embeddings, labels)
        same = labels[:, None] == labels[6:]
        itself = torch.arange(16)[:, None] == torch.arange(6, 16)
        pairs = (*(same & ~itself).nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
        expected = loss(embeddings, labels, pairs, embeddings[6:].detach(), labels[6:])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_batch_that_is_not_finite_stays_out():
    memory = CrossBatchMemory(peer.ContrastiveLoss(), D, M)
    embeddings, labels = draw(6)
    memory(embeddings, labels)
    before = copy.deepcopy(memory.state_dict())
    bad = torch.where(torch.arange(D) == 1, torch.nan, embeddings)
    memory(bad, labels)
    assert memory.queue.skipped == 1
    after = memory.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith(("skipped", "offered")))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("loss", [*BLOCKWISE, peer.TripletMarginLoss])
def test_half_precision_loss_equals_float32_of_the_same_values(loss, miner, dtype, autocast):
    half = CrossBatchMemory(loss(), D, M, MINERS[miner](), adaptation="xbn")
    full = copy.deepcopy(half)
    for _ in range(3):
        embeddings, labels = draw(8, dtype=dtype)
        exact = embeddings.detach().float().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            found = half(embeddings, labels)
        expected = full(exact, labels)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(found, embeddings)[0].float(), torch.autograd.grad(expected, exact)[0]]
        torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)
    assert half.queue.rows.dtype == torch.float32


@pytest.mark.slow
def test_resume_in_a_new_process_equals_an_uninterrupted_run(tmp_path):
    states, expected = {}, {}
    for kind in KINDS:
        torch.manual_seed(1)
        training = Training(kind)
        training.go(0, 5)
        states[kind] = copy.deepcopy(training.state())
        training.go(5, 9)
        expected[kind] = training
    torch.save(states, tmp_path / "state.pt")
    command = [sys.executable, "-m", "tests.integrations.memory_program", str(tmp_path / "state.pt"), "5", "9"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    for kind, found in torch.load(tmp_path / "state.pt", weights_only=True).items():
        assert found["losses"] == expected[kind].losses[5:]
        for part, tensors in expected[kind].state().items():
            assert tensors.keys() == found[part].keys()
            assert all(torch.equal(tensors[name], found[part][name]) for name in tensors)


def rank_steps(rank, world_size, folder):
    """Three steps on a batch of its own in each process, masked in the last."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    memory = CrossBatchMemory(peer.SupConLoss(), D, 20, adaptation="xbn")
    wrapped, values = DistributedLossWrapper(memory), []
    for step in range(3):
        embeddings, labels, mask = rank_batch(step, rank)
        values.append(wrapped(embeddings, labels, enqueue_mask=mask if step == 2 else None).item())
    torch.save({"memory": memory.state_dict(), "values": values}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def rank_batch(step, rank):
    torch.manual_seed(100 * step + rank)
    return *draw(6), torch.rand(6) < 0.5


def test_distributed_loss_wrapper_keeps_rows_in_rank_order(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=rank_steps, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone, values = CrossBatchMemory(peer.SupConLoss(), D, 20, adaptation="xbn"), []
    for step in range(3):
        embeddings, labels, mask = (
            torch.cat(parts) for parts in zip(*(rank_batch(step, r) for r in range(2)), strict=True)
        )
        values.append(2 * alone(embeddings, labels, enqueue_mask=mask if step == 2 else None).item())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["values"] == pytest.approx(values, rel=1e-12)
        assert all(torch.equal(found["memory"][name], tensor) for name, tensor in alone.state_dict().items())


# ----------------------------------------------------------------------------------------------- as part of programs


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_a_copy_goes_on_as_the_original_does_and_alone(make_copy):
    memory = CrossBatchMemory(peer.SupConLoss(), D, M, PairMarginMiner(), adaptation=AXBN(r=1.0))
    memory(*draw(10))
    twin = make_copy(memory)
    for _ in range(3):
        embeddings, labels = draw(10)
        assert memory(embeddings, labels).item() == twin(embeddings, labels).item()
    before = twin.embedding_memory
    memory(*draw(10))
    assert torch.equal(twin.embedding_memory, before)


def test_reset_queue_forgets_everything():
    memory = CrossBatchMemory(peer.SupConLoss(), D, M, adaptation=AXBN(r=1.0))
    batches = [draw(10) for _ in range(4)]
    first = [memory(*batch).item() for batch in batches]
    memory.reset_queue()
    assert (memory.queue_idx, memory.has_been_filled, int(memory.label_memory.sum())) == (0, False, 0)
    assert [memory(*batch).item() for batch in batches] == first


def test_add_to_memory_fills_the_memory_without_a_loss():
    ours, theirs = both(peer.ContrastiveLoss())
    for rows in (10, 9):
        embeddings, labels = draw(rows, dtype=torch.float32)
        ours.add_to_memory(embeddings, labels, rows)
        theirs.add_to_memory(embeddings, labels, rows)
    assert_equal_step(ours, theirs, *draw(9))


def test_labels_of_any_type_of_whole_numbers_are_the_same_labels():
    embeddings, labels = draw(12)
    expected = CrossBatchMemory(peer.SupConLoss(), D, M)(embeddings, labels)
    for dtype in (torch.int32, torch.uint8, torch.float32, torch.float64):
        assert torch.equal(CrossBatchMemory(peer.SupConLoss(), D, M)(embeddings, labels.to(dtype)), expected)


def test_lightning_checkpoint_contains_the_memory(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network, self.memory = nn.Linear(5, D), CrossBatchMemory(peer.SupConLoss(), D, M, PairMarginMiner())
            self.losses = []

        def training_step(self, batch, index):
            loss = self.memory(self.network(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(30, 5), torch.randint(0, 3, (30,)))

    def fit(epochs, **kwargs):
        torch.manual_seed(0)
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, 10), **kwargs)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = fit(4)
    fit(2)
    resumed = fit(4, ckpt_path=tmp_path / "2.ckpt")
    assert resumed.losses == whole.losses[6:]
    assert torch.equal(resumed.memory.embedding_memory, whole.memory.embedding_memory)


@pytest.mark.slow
def test_pmls_trainer_and_tester_run_with_ours_as_with_pmls():
    program = pytest.importorskip("experiments.dropin.pml_supervised")
    pytest.importorskip("faiss")
    args = argparse.Namespace(seed=0, dtype="float64", memory=100, batch=32, epochs=1)
    expected = program.run(peer.CrossBatchMemory, args)
    found = program.run(lambda *a, **k: CrossBatchMemory(*a, **k, adaptation="xbm"), args)
    assert len(found.losses) == 27
    assert found.losses == pytest.approx(expected.losses, rel=1e-9)
    assert found.accuracies == pytest.approx(expected.accuracies, rel=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", BLOCKWISE)
def test_a_step_on_a_gpu_does_not_wait_and_gives_the_cpus_loss(loss):
    memory, on_cpu = (CrossBatchMemory(loss(), D, M, PairMarginMiner()) for _ in range(2))
    for step in range(4):
        embeddings, labels = draw(8, dtype=torch.float32)
        mask = torch.arange(8) < 5 if step == 3 else None
        on_gpu = embeddings.detach().cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        found = memory(on_gpu, labels, enqueue_mask=mask)
        torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(found.cpu(), on_cpu(embeddings, labels, enqueue_mask=mask), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_faults_of_the_user_are_named():
    with pytest.raises(Exception, match="not supported for VICRegLoss"):
        CrossBatchMemory(peer.VICRegLoss(), D)
    with pytest.raises(UserError, match=r"'xnb'.*did you mean xbn"):
        CrossBatchMemory(peer.SupConLoss(), D, adaptation="xnb")
    with pytest.raises(UserError, match="size=0"):
        CrossBatchMemory(peer.SupConLoss(), D, 0)
    memory = CrossBatchMemory(peer.SupConLoss(), D)
    embeddings, labels = draw(4)
    with pytest.raises(UserError, match=r"whole numbers as labels, got 0\.5"):
        memory(embeddings, torch.tensor([3.0, 0.5, 1.0, 2.5]))
    with pytest.raises(ValueError, match="mutually exclusive"):
        memory(embeddings, labels, (labels,) * 3, labels > 0)
    with pytest.raises(ValueError, match=r"enqueue_mask of 4 rows, got \[5\]"):
        memory(embeddings, labels, enqueue_mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[B, 4\], got \[4, 3\]"):
        memory(embeddings[:, :3], labels)
