"""CrossBatchMemory in programs that touch what it is made of: hooks, subclasses, state, masks, second derivatives."""

import copy
import types

import numpy as np
import pytest
import pytorch_metric_learning.losses
import torch
import torch.nn.functional as F
from integrations.memory_helpers import BLOCKWISE, D, M, assert_equal_step, both, draw, easiest
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.miners import (
    BatchEasyHardMiner,
    BatchHardMiner,
    HDCMiner,
    PairMarginMiner,
    TripletMarginMiner,
    UniformHistogramMiner,
)
from torch import nn

from selfsup_xbn import CrossBatchMemory
from selfsup_xbn.errors import UserError
from selfsup_xbn.integrations import pytorch_metric_learning as module

ADAPTATIONS = ["xbm", "xbn", "axbn"]
PeerMemory = peer.CrossBatchMemory

# -------------------------------------------------------------------------------------------------- second derivatives


def penalty(memory, embeddings, labels):
    """The gradient of a gradient penalty."""
    (slope,) = torch.autograd.grad(memory(embeddings, labels), embeddings, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), embeddings)[0]


@pytest.mark.parametrize("miner", [None, PairMarginMiner(0.1, 1.9)])
@pytest.mark.parametrize("loss", BLOCKWISE)
def test_second_derivatives_are_refused_or_are_pmls(loss, miner):
    embeddings, labels = draw(16)
    memory = CrossBatchMemory(loss(), D, 40, miner, adaptation="xbm")
    for way in (
        lambda: penalty(memory, embeddings, labels),
        lambda: memory(embeddings, labels).backward(create_graph=True),
    ):
        with pytest.raises(RuntimeError, match="implementation='dense'"):
            way()
    ours = CrossBatchMemory(loss(), D, 40, miner, adaptation="xbm", implementation="dense")
    theirs = penalty(PeerMemory(loss(), D, 40, miner), embeddings, labels)
    torch.testing.assert_close(penalty(ours, embeddings, labels), theirs, rtol=1e-7, atol=1e-8)


# --------------------------------------------------------------------------------- what a subclass or an instance adds


def half_of_negatives(self, *args):
    """Every other negative of what the class returns."""
    a1, p, a2, n = super(type(self), self).create_indices_tuple(*args)
    return a1, p, a2[::2], n[::2]


def subclass(memory):
    name = type(memory).__name__
    memory.__class__ = type(name, (type(memory),), {"create_indices_tuple": half_of_negatives})


def instance(memory):
    original = memory.create_indices_tuple
    memory.create_indices_tuple = lambda *args: tuple(index[::2] for index in original(*args))


def fewer_pairs(self, *args, **kwargs):
    a1, p, a2, n = type(self).forward(self, *args, **kwargs)
    return a1[::2], p[::2], a2[1:], n[1:]


def half_of_cosine(queries, references):
    return 0.5 * F.normalize(queries) @ F.normalize(references).T


def no_loss(embeddings, *args):
    return {"loss": {"losses": embeddings.sum() * 0, "indices": None, "reduction_type": "already_reduced"}}


CHANGES = {
    "subclass": subclass,
    "instance": instance,
    "hook of the loss": lambda m: m.loss.register_forward_hook(lambda module, args, output: 2 * output),
    "pre-hook of the loss": lambda m: m.loss.register_forward_pre_hook(lambda module, args: (args[0] + 0.1, *args[1:])),
    "hook of the reducer": lambda m: m.loss.reducer.register_forward_hook(lambda module, args, output: 3 * output),
    "hook of the miner": lambda m: m.miner.register_forward_hook(lambda module, args, pairs: [i[::2] for i in pairs]),
    "method of the miner": lambda m: setattr(m.miner, "forward", types.MethodType(fewer_pairs, m.miner)),
    "method of the loss": lambda m: setattr(m.loss, "compute_loss", no_loss),
    "method of the distance": lambda m: setattr(m.loss.distance, "forward", half_of_cosine),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("loss", BLOCKWISE)
@pytest.mark.usefixtures("unchecked")
def test_what_a_program_adds_to_the_parts_is_called_as_pml_calls_it(loss, change):
    ours, theirs = both(loss(), PairMarginMiner(0.1, 1.9))
    plain = copy.deepcopy(ours)
    for memory in (ours, theirs):
        CHANGES[change](memory)
    values = []
    for rows in (8, 7, 8, 8):
        batch = draw(rows)
        values.append((assert_equal_step(ours, theirs, *batch), plain(*batch).item()))
    assert all(abs(changed - unchanged) > 1e-3 for changed, unchanged in values)


def test_a_property_of_a_subclass_is_read():
    class Flipped(CrossBatchMemory):
        @property
        def label_memory(self):
            return (self.queue.labels + 1) % 3

    memory = Flipped(peer.SupConLoss(), D, M, adaptation="xbm")
    embeddings, labels = draw(8)
    value = memory(embeddings, labels)
    itself = torch.eye(8, dtype=torch.bool)
    same = labels[:, None] == (labels + 1) % 3
    pairs = (*(same & ~itself).nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
    expected = peer.SupConLoss()(embeddings, labels, pairs, embeddings.detach(), (labels + 1) % 3)
    torch.testing.assert_close(value, expected)


# --------------------------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("loss", BLOCKWISE)
def test_a_temperature_is_learned_or_refused(loss):
    ours, theirs = both(loss(temperature=nn.Parameter(torch.tensor(0.2, dtype=torch.float64))))
    for _ in range(3):
        embeddings, labels = draw(8)
        values = [memory(embeddings, labels) for memory in (ours, theirs)]
        slopes = [torch.autograd.grad(v, m.loss.temperature)[0] for v, m in zip(values, (ours, theirs), strict=True)]
        torch.testing.assert_close(*slopes)
        assert slopes[0].abs() > 0.01
    for bad in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(UserError, match="temperature above 0"):
            CrossBatchMemory(loss(temperature=bad), D, M)


# ------------------------------------------------------------------------------------------------ own rows in mining


@pytest.mark.parametrize("adaptation", ["xbm", "xbn"])
def test_an_easy_positive_is_another_row_than_the_anchor(adaptation):
    miner = BatchEasyHardMiner(pos_strategy="easy", neg_strategy="hard")
    loss = peer.TripletMarginLoss(margin=1.0)
    memory = CrossBatchMemory(loss, D, M, miner, adaptation=adaptation)
    for rows in (8, 8, 7, 8):
        embeddings, labels = draw(rows)
        labels[0] = 50 + rows  # a class with the own row alone
        found = memory(embeddings, labels)
        n = len(memory.queue)
        stored, stored_labels = memory.queue.features(), memory.label_memory[:n]
        triplets = easiest(embeddings, labels, stored, stored_labels, memory.curr_batch_idx)
        expected = loss(embeddings, labels, triplets, stored, stored_labels)
        assert found > 0
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "miner",
    [
        BatchHardMiner(),
        BatchEasyHardMiner(pos_strategy="easy", neg_strategy="all"),
        BatchEasyHardMiner(pos_strategy="semihard", neg_strategy="hard"),
        BatchEasyHardMiner(pos_strategy="easy", neg_strategy="semihard"),
        TripletMarginMiner(0.4),
        HDCMiner(0.9),
        UniformHistogramMiner(4, 3),
    ],
    ids=["hard", "easy, all", "semihard", "easy, semihard", "triplets", "hdc", "histogram"],
)
def test_no_miner_leaves_an_anchor_with_itself(miner):
    memory = CrossBatchMemory(peer.ContrastiveLoss(), D, M, miner, adaptation="xbm")
    for _ in range(4):
        embeddings, labels = draw(8)
        assert memory(embeddings, labels) > 0
        n = len(memory.queue)
        pairs = memory.create_indices_tuple(
            embeddings, labels, memory.queue.features(), memory.label_memory[:n], None, True
        )
        assert not (pairs[1] == memory.curr_batch_idx[pairs[0]]).any()
        assert (labels[pairs[0]] == memory.label_memory[pairs[1]]).all()
        assert (labels[pairs[0 if len(pairs) == 3 else 2]] != memory.label_memory[pairs[-1]]).all()
        assert len(pairs[0])


# ----------------------------------------------------------------------------------------------- order of the ranks


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_given_tuple_is_in_the_order_of_the_gathered_batch(rank, kind, monkeypatch):
    """DistributedLossWrapper hands over the batch with this rank's rows first, and a tuple in that order."""
    monkeypatch.setattr(module, "world", lambda: 2)
    monkeypatch.setattr(module, "rank", lambda: rank)
    ours, theirs = both(peer.ContrastiveLoss())
    miner = TripletMarginMiner(0.5) if kind == 3 else PairMarginMiner(0.1, 1.9)
    for rows in (8, 6, 8):  # at the end of the memory, PML overwrites other rows than on another rank
        embeddings, labels = draw(rows)
        mined = list(miner(embeddings, labels))
        for place in (1, kind - 1):
            mined[place] = (mined[place] + theirs.queue_idx) % M
        values = [memory(embeddings, labels, tuple(mined)) for memory in (ours, theirs)]
        torch.testing.assert_close(*values)
        order = ours.curr_batch_idx
        assert rank == 0 or not torch.equal(order, theirs.curr_batch_idx)
        assert torch.equal(ours.label_memory[order], labels)


def test_a_given_tuple_has_no_pair_with_rows_that_were_not_enqueued():
    memory, tuples = CrossBatchMemory(peer.ContrastiveLoss(), D, M), []
    memory(*draw(8))
    memory.create_indices_tuple = lambda *args: tuples.append(args[4]) or args[4]
    embeddings, labels = draw(8)
    bad = torch.where(torch.arange(8)[:, None] == 7, torch.nan, embeddings)
    a, p, a2, n = PairMarginMiner(0.1, 1.9)(embeddings, labels)
    memory(bad, labels, (a, p + 8, a2, n))  # the negatives are rows of the batch before
    assert [len(index) for index in tuples[0]] == [0, 0, len(n), len(n)]
    assert torch.equal(tuples[0][3], n)


# --------------------------------------------------------------------------------------------------------- no anchors


@pytest.mark.parametrize("loss", peer.CrossBatchMemory.supported_losses())
@pytest.mark.parametrize("miner", [None, TripletMarginMiner(), BatchEasyHardMiner()], ids=["none", "triplet", "easy"])
def test_a_batch_without_anchors_is_zero_with_a_zero_gradient(loss, miner):
    memory = CrossBatchMemory(getattr(peer, loss)(), D, 40, miner)
    embeddings, labels = draw(8)
    nothing, none = draw(0)
    for batch, mask in (
        ((nothing, none), None),
        ((embeddings, labels), torch.ones(8, dtype=torch.bool)),
        ((nothing, none), None),
    ):
        value = memory(*batch, enqueue_mask=mask)
        assert value.item() == 0
        assert not torch.autograd.grad(value, batch[0])[0].any()
    assert len(memory.queue) == 8


# ------------------------------------------------------------------------------------------------- the peer's names


def test_the_peers_name_may_be_replaced_by_ours(monkeypatch):
    monkeypatch.setattr(pytorch_metric_learning.losses, "CrossBatchMemory", CrossBatchMemory)
    memory = pytorch_metric_learning.losses.CrossBatchMemory(peer.SupConLoss(), D, M)
    assert memory(*draw(8)).isfinite()
    assert isinstance(memory, PeerMemory)


def steps(memory, count, seed):
    torch.manual_seed(seed)
    return [memory(*draw(7)).item() for _ in range(count)]


@pytest.mark.parametrize("batches", [0, 2, 5])
@pytest.mark.parametrize("loss", [peer.SupConLoss, peer.TripletMarginLoss])
def test_a_checkpoint_of_pml_is_taken_over(loss, batches):
    theirs, ours = PeerMemory(loss(), D, M), CrossBatchMemory(loss(), D, M, adaptation="xbm")
    steps(theirs, batches, 0)
    if theirs.has_been_filled:  # PML does not save where it goes on
        theirs.queue_idx = 0
    wrapped = nn.ModuleDict({"memory": ours})
    wrapped.load_state_dict({f"memory.{name}": value for name, value in theirs.state_dict().items()})
    assert (ours.queue_idx, ours.has_been_filled) == (theirs.queue_idx, theirs.has_been_filled)
    assert torch.equal(ours.embedding_memory, theirs.embedding_memory.to(ours.embedding_memory))
    assert steps(ours, 6, 1) == pytest.approx(steps(theirs, 6, 1))
    with pytest.raises(RuntimeError, match="size mismatch"):
        CrossBatchMemory(loss(), D, M + 1).load_state_dict(theirs.state_dict())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
@pytest.mark.parametrize("filled", [True, False])
def test_the_state_can_be_assigned_under_pmls_names(adaptation, order, filled):
    source, target = (CrossBatchMemory(peer.SupConLoss(), D, M, adaptation=adaptation) for _ in range(2))
    steps(source, 5 if filled else 2, 0)
    names = ("embedding_memory", "label_memory", "queue_idx", "has_been_filled")
    for index in order:
        value = getattr(source, names[index])
        setattr(target, names[index], value.clone() if isinstance(value, torch.Tensor) else value)
    for name in names[2:]:
        assert getattr(target, name) == getattr(source, name)
    for name in names[:2]:
        torch.testing.assert_close(getattr(target, name), getattr(source, name))
    for a, b in zip(source.queue.moments(), target.queue.moments(), strict=True):
        torch.testing.assert_close(a, b)
    if adaptation == "axbn":
        target.queue.adaptation.load_state_dict(source.queue.adaptation.state_dict())
    assert steps(target, 6, 1) == pytest.approx(steps(source, 6, 1), rel=1e-9)


def test_a_program_that_writes_into_the_memory_gives_pmls_numbers_or_an_error():
    ours, theirs = both(peer.SupConLoss())
    for memory in (ours, theirs):
        steps(memory, 5, 0)
        memory.embedding_memory[3:6] *= -1
        memory.label_memory[3:6] = 1
        memory.queue_idx = 2
    assert steps(ours, 4, 1) == pytest.approx(steps(theirs, 4, 1))
    adapted = CrossBatchMemory(peer.SupConLoss(), D, M)
    steps(adapted, 2, 0)
    for change in (lambda rows: rows.zero_(), lambda rows: rows.__setitem__(0, 1.0), lambda rows: rows.__imul__(2)):
        with pytest.raises(RuntimeError, match="assignment of the whole tensor"):
            change(adapted.embedding_memory)
    rows = adapted.embedding_memory
    assert type(rows + 1) is type(rows.clone()) is type(rows[2]) is torch.Tensor
    with pytest.raises(ValueError, match="slot in"):
        adapted.queue_idx = M
    with pytest.raises(ValueError, match="shape"):
        adapted.embedding_memory = torch.zeros(M + 1, D)


def test_a_memory_is_built_on_the_meta_device():
    saved = CrossBatchMemory(peer.SupConLoss(), D, M)
    steps(saved, 3, 0)
    with torch.device("meta"):
        memory = CrossBatchMemory(peer.SupConLoss(), D, M)
    assert "queue_idx" in str(memory) or memory.queue.rows.is_meta
    memory.to_empty(device="cpu").load_state_dict(saved.state_dict())
    assert steps(memory, 3, 1) == steps(saved, 3, 1)


# ------------------------------------------------------------------------------------------------ refused beforehand


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("loss", [peer.SupConLoss(), peer.TripletMarginLoss()])
def test_a_memory_refuses_the_recomputation_of_a_checkpoint(loss, reentrant):
    memory = CrossBatchMemory(loss, D, M)
    embeddings, labels = draw(8)
    value = torch.utils.checkpoint.checkpoint(memory, embeddings, labels, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint computes again"):
        value.backward()
    assert memory.queue_idx == 8


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("loss", [peer.SupConLoss(), peer.TripletMarginLoss()])
def test_input_that_does_not_fit_is_named_before_anything_moves(loss):
    memory = CrossBatchMemory(loss, D, M)
    memory(*draw(8))
    before = copy.deepcopy(memory.state_dict())
    z, y = draw(8)
    mask = torch.arange(8) < 4
    calls = {
        "embeddings of shape": [(z[0], y), (z[:, :2], y), (z[None], y)],
        "floating point embeddings": [(z.long(), y)],
        r"labels of shape \[8\]": [(z, y[:5]), (z, torch.cat([y, y])), (z, y[:, None]), (z, y[0])],
        "whole numbers": [(z, y + 0.5), (z, y * torch.nan)],
        "boolean enqueue_mask": [
            (z, y, None, mask.long()),
            (z, y, None, mask.to(torch.uint8)),
            (z, y, None, mask.double()),
        ],
        "enqueue_mask of 8 rows": [(z, y, None, mask[:3]), (z, y, None, mask[:, None])],
        "pairs .* or triplets": [(z, y, (y, y)), (z, y, (y,) * 5)],
    }
    for message, arguments in calls.items():
        for call in arguments:
            with pytest.raises(ValueError, match=message):
                memory(*call)
    for labels in (y[:5], y[:, None], y + 0.5):
        with pytest.raises(ValueError, match="labels"):
            memory.add_to_memory(z.detach(), labels, 8)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


@pytest.mark.usefixtures("unchecked")
def test_sizes_that_are_no_whole_numbers_are_refused_by_name():
    for sizes, message in (
        ((8.0, 4), "expected a whole number as embedding_size, got 8.0"),
        ((8, "4"), "expected a whole number as memory_size, got '4'"),
    ):
        with pytest.raises(UserError, match=message):
            CrossBatchMemory(peer.ContrastiveLoss(), *sizes)
    assert type(CrossBatchMemory(peer.ContrastiveLoss(), np.int64(8), np.int64(4)).memory_size) is int
