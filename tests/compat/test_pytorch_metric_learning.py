"""CrossBatchMemory against PML's own in float64, and where PML's is at fault."""

import argparse
import copy
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import MultiSimilarityMiner, PairMarginMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from pytorch_metric_learning.regularizers import LpRegularizer
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from reference import ReferenceQueue
from torch import nn

from selfsup_xbn import AXBN, CrossBatchMemory, FeatureQueue, losses
from selfsup_xbn.errors import UserError
from tests.compat.memory_program import KINDS, Training

M, D = 24, 4
MINERS = {
    "no miner": lambda: None,
    "pair margin": PairMarginMiner,
    "multi-similarity": MultiSimilarityMiner,
    "triplet margin": TripletMarginMiner,
}
BATCHES = {"first batch": [8], "partly filled": [8, 7], "full": [8, 8, 8], "wrapped": [8, 7, 7, 8, 5]}
BLOCKWISE = [peer.SupConLoss, peer.NTXentLoss]


def draw(rows, classes=3, dtype=torch.float64):
    """Embeddings near their class's centre, with a gradient, and labels."""
    centres = torch.randn(classes, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    labels = torch.randint(0, classes, (rows,))
    embeddings = centres[labels] + torch.randn(rows, D, dtype=torch.float64)
    return embeddings.to(dtype).requires_grad_(), labels


def both(loss, miner=None, size=M, **kwargs):
    """Our memory and PML's, around copies of one loss and one miner."""
    ours = CrossBatchMemory(copy.deepcopy(loss), D, size, copy.deepcopy(miner), adaptation="xbm", **kwargs)
    return ours, peer.CrossBatchMemory(loss, D, size, miner, **kwargs)


def assert_equal_step(ours, theirs, embeddings, labels, *args, **kwargs):
    """One step of each: same value, same gradient, same memory."""
    expected = theirs(embeddings, labels, *args, **kwargs)
    found = ours(embeddings, labels, *args, **kwargs)
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(loss, embeddings)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    for name in ("embedding_memory", "label_memory", "curr_batch_idx"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)
    assert (ours.queue_idx, ours.has_been_filled) == (theirs.queue_idx, theirs.has_been_filled)
    return found.item()


@pytest.fixture(params=["small blocks", "fixed shapes"])
def ways_to_read(request, monkeypatch):
    """Blocks smaller than the memory; and the way of an accelerator, where no shape may depend on values."""
    monkeypatch.setattr(losses, "BLOCK_ROWS", 7)
    if request.param == "fixed shapes":
        monkeypatch.setattr(losses, "_may_wait", lambda tensor: False)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.fixture
def no_copy(monkeypatch):
    """Fails where the memory is read as a whole, as it is on PML's way."""

    def fail(queue):
        raise AssertionError("the whole memory was read")

    monkeypatch.setattr(FeatureQueue, "features", fail)


# ------------------------------------------------------------------------------------------------------ PML's numbers


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("state", [*BATCHES, "enqueue_mask"])
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("loss", peer.CrossBatchMemory.supported_losses())
def test_xbm_gives_pmls_values_gradients_and_memory(loss, miner, state):
    ours, theirs = both(getattr(peer, loss)(), MINERS[miner]())
    values = []
    for rows in BATCHES.get(state, [9, 11, 12, 9, 10]):
        mask = torch.rand(rows) < 0.6 if state == "enqueue_mask" else None
        values.append(assert_equal_step(ours, theirs, *draw(rows), enqueue_mask=mask))
    assert any(values), "nothing was compared"


@pytest.mark.parametrize("distance", [LpDistance(), CosineSimilarity()], ids=["euclidean", "cosine"])
@pytest.mark.parametrize("margins", [None, (0.5, 1.2), (0.0, 0.3)])
@pytest.mark.parametrize("loss", BLOCKWISE)
@pytest.mark.usefixtures("ways_to_read", "unchecked")
def test_the_blockwise_way_gives_pmls_numbers(loss, margins, distance):
    ours, theirs = both(loss(temperature=0.3), margins and PairMarginMiner(*margins, distance=distance))
    for rows in (8, 8, 7, 7, 8):
        embeddings, labels = draw(rows, classes=4)
        labels[:2] = 90 + torch.arange(2)  # anchors without positives
        assert_equal_step(ours, theirs, embeddings, labels)


@pytest.mark.parametrize("miner", [None, PairMarginMiner(0.3, 1.0)])
@pytest.mark.usefixtures("ways_to_read", "unchecked")
def test_the_gradient_of_nt_xent_passes_gradcheck(miner):
    queue = FeatureQueue(M, D, "xbn", labels=True, dtype=torch.float64)
    for _ in range(7):
        embeddings, labels = draw(4)
        queue.adapt(embeddings)
        slots = queue.enqueue(embeddings, labels)
    margin = miner and losses.PairMargin(0.3, 1.0)
    assert torch.autograd.gradcheck(
        lambda z: losses.nt_xent(z, labels, queue, temperature=0.4, miner=margin, own_slots=slots), (embeddings,)
    )


@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("given_by", [PairMarginMiner(0.2, 1.2), TripletMarginMiner(0.5)])
@pytest.mark.parametrize("loss", [peer.SupConLoss(), peer.ContrastiveLoss(), peer.TripletMarginLoss()])
def test_a_given_indices_tuple_is_added_as_pml_adds_it(loss, given_by, miner):
    ours, theirs = both(loss, MINERS[miner]())
    for rows in (8, 8, 8, 7):
        embeddings, labels = draw(rows)
        assert_equal_step(ours, theirs, embeddings, labels, _in_slots(given_by(embeddings, labels), labels, theirs))


def _in_slots(given, labels, memory):
    """Indices of a batch's rows as the slots that PML's memory will give them, the anchors' apart."""
    slots = (memory.queue_idx + torch.arange(len(labels))) % memory.memory_size
    anchors = (0,) if len(given) == 3 else (0, 2)
    return tuple(index if place in anchors else slots[index] for place, index in enumerate(given))


def test_a_batch_as_large_as_the_memory_gives_pmls_numbers():
    ours, theirs = both(peer.ContrastiveLoss())
    for rows in (5, M, M):
        assert_equal_step(ours, theirs, *draw(rows))


@pytest.mark.parametrize("adaptation", ["xbn", "axbn"])
@pytest.mark.parametrize("miner", [None, PairMarginMiner(0.2, 1.2)])
@pytest.mark.parametrize("loss", [*BLOCKWISE, peer.ContrastiveLoss])
def test_xbn_gives_pmls_loss_against_the_literally_adapted_memory(loss, miner, adaptation):
    ours, reference = CrossBatchMemory(loss(), D, M, miner, adaptation), ReferenceQueue(M, adaptation)
    for _ in range(5):
        embeddings, labels = draw(10)
        found = ours(embeddings, labels)
        reference.adapt(embeddings.detach())
        reference.enqueue(embeddings.detach(), labels.tolist())
        theirs = peer.CrossBatchMemory(
            loss(), D, M, miner
        )  # its rows are the reference's, the batch's the last of them
        n = len(reference.rows)
        theirs.embedding_memory = torch.zeros(M, D, dtype=torch.float64)
        theirs.embedding_memory[:n] = torch.tensor(list(map(list, reference.rows)))
        theirs.label_memory[:n] = torch.tensor(list(reference.labels))
        theirs.queue_idx, theirs.has_been_filled = n - 10, n == M
        expected = theirs(embeddings, labels)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        gradients = [torch.autograd.grad(loss, embeddings)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- the two ways


@pytest.mark.parametrize("miner", [None, PairMarginMiner(), PairMarginMiner(0.5, 0.2, distance=CosineSimilarity())])
@pytest.mark.parametrize("loss", BLOCKWISE)
@pytest.mark.usefixtures("no_copy")
def test_plain_losses_never_read_the_whole_memory(loss, miner):
    memory = CrossBatchMemory(loss(), D, M, miner)
    assert [memory(*draw(8)).item() for _ in range(3)]


class Sharper(peer.SupConLoss):
    """A user's own variant, under the name that PML's check of supported losses asks for."""

    def _compute_loss(self, mat, *masks):
        return super()._compute_loss(3 * mat, *masks)


Sharper.__name__ = "SupConLoss"
OTHERS = {
    "reducer": (peer.SupConLoss(reducer=MeanReducer()), None),
    "reducer's bound": (peer.SupConLoss(reducer=AvgNonZeroReducer(high=2.0)), None),
    "distance": (peer.NTXentLoss(distance=LpDistance()), None),
    "distance's power": (peer.SupConLoss(distance=CosineSimilarity(power=3)), None),
    "regularizer": (peer.NTXentLoss(embedding_regularizer=LpRegularizer()), None),
    "miner's distance": (peer.SupConLoss(), PairMarginMiner(0.2, 1.0, distance=LpDistance(p=1))),
    "lengths": (peer.SupConLoss(), PairMarginMiner(0.2, 1.0, distance=LpDistance(normalize_embeddings=False))),
    "negative margin": (peer.SupConLoss(), PairMarginMiner(-1.0, 1.0)),
    "statistics": (peer.SupConLoss(), PairMarginMiner(collect_stats=True)),
    "learnt temperature": (peer.SupConLoss(temperature=nn.Parameter(torch.tensor(0.2).double())), None),
    "subclass": (Sharper(), None),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_not_plain_gives_pmls_numbers(what):
    ours, theirs = both(*OTHERS[what])
    for _ in range(4):
        embeddings, labels = draw(8)
        labels[0] = 99  # an anchor without positives
        assert_equal_step(ours, theirs, embeddings, labels)


@pytest.mark.parametrize("loss", BLOCKWISE)
@pytest.mark.parametrize("collect_stats", [False, True])
def test_records_are_pmls(loss, collect_stats):
    options = {"collect_stats": collect_stats}
    loss = loss(reducer=(AvgNonZeroReducer if loss is peer.SupConLoss else MeanReducer)(**options), **options)
    ours, theirs = both(loss, PairMarginMiner(0.2, 1.2, **options), **options)
    for _ in range(4):
        assert_equal_step(ours, theirs, *draw(8))
        for a, b in [(ours, theirs), (ours.miner, theirs.miner), (ours.loss.reducer, theirs.loss.reducer)]:
            assert _records(a) == _records(b)
        assert ours.miner.num_pos_pairs == theirs.miner.num_pos_pairs > 0
        assert ours.miner.num_neg_pairs == theirs.miner.num_neg_pairs > 0


def _records(module):
    names = itertools.chain(*(getattr(module, kind, []) for kind in ("_record_these", "_record_these_stats")))
    return {name: getattr(module, name) for name in names}


# -------------------------------------------------------------------------------------------------- PML's faults


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
def test_a_mask_that_enqueues_nothing_leaves_an_empty_memory_empty(loss):
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
def test_of_a_masked_batch_larger_than_the_memory_the_last_rows_are_kept_once(loss):
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


def test_an_unmasked_batch_larger_than_the_memory_meets_its_last_rows_but_not_itself():
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
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith("skipped"))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("loss", [*BLOCKWISE, peer.TripletMarginLoss])
def test_half_precision_gives_the_float32_loss_of_the_same_values(loss, miner, dtype, autocast):
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


def test_save_load_in_a_fresh_process_and_go_on_is_as_not_to_have_stopped(tmp_path):
    states, expected = {}, {}
    for kind in KINDS:
        torch.manual_seed(1)
        training = Training(kind)
        training.go(0, 5)
        states[kind] = copy.deepcopy(training.state())
        training.go(5, 9)
        expected[kind] = training
    torch.save(states, tmp_path / "state.pt")
    command = [sys.executable, "-m", "tests.compat.memory_program", str(tmp_path / "state.pt"), "5", "9"]
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


def test_under_distributed_loss_wrapper_all_ranks_hold_the_same_rows_in_the_order_of_ranks(tmp_path):
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


def test_in_a_lightning_module_the_memory_is_in_the_checkpoint_and_goes_on(tmp_path):
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
    with pytest.raises(UserError, match="'xnb': try 'xbn'"):
        CrossBatchMemory(peer.SupConLoss(), D, adaptation="xnb")
    with pytest.raises(UserError, match="size=0"):
        CrossBatchMemory(peer.SupConLoss(), D, 0)
    memory = CrossBatchMemory(peer.SupConLoss(), D)
    embeddings, labels = draw(4)
    with pytest.raises(UserError, match=r"whole numbers as labels, got 0\.5"):
        memory(embeddings, torch.tensor([3.0, 0.5, 1.0, 2.5]))
    with pytest.raises(ValueError, match="mutually exclusive"):
        memory(embeddings, labels, (labels,) * 3, labels > 0)
    with pytest.raises(ValueError, match="enqueue_mask of 4 rows, got 5"):
        memory(embeddings, labels, enqueue_mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[B, 4\], got \[4, 3\]"):
        memory(embeddings[:, :3], labels)
