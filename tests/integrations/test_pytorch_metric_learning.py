"""CrossBatchMemory against PML's own in float64."""

import itertools

import pytest
import torch
from integrations.memory_helpers import BLOCKWISE, MINERS, D, M, assert_equal_step, both, draw
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import PairMarginMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from pytorch_metric_learning.regularizers import LpRegularizer
from reference import ReferenceQueue
from torch import nn

from selfsup_xbn import CrossBatchMemory, FeatureQueue, losses

BATCHES = {"full": [8, 8, 8], "wrapped": [8, 7, 7, 8, 5]}


@pytest.fixture(params=["default", "fixed shapes"])
def ways_to_read(request, monkeypatch):
    """The way of a CPU, and that of an accelerator, where no shape may depend on values, in eight blocks."""
    if request.param == "fixed shapes":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.fixture
def no_copy(monkeypatch):
    """Fails where the memory is read as a whole, as it is on PML's way."""

    def fail(queue):
        raise AssertionError("the whole memory was read")

    monkeypatch.setattr(FeatureQueue, "features", fail)


# ------------------------------------------------------------------------------------------------------ PML's numbers


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize(
    ("loss", "state"),
    [
        *itertools.product(peer.CrossBatchMemory.supported_losses(), ("wrapped", "enqueue_mask")),
        *itertools.product(("SupConLoss", "NTXentLoss", "ContrastiveLoss"), ("full",)),
    ],
)
def test_xbm_gives_pmls_values_gradients_and_memory(loss, miner, state):
    ours, theirs = both(getattr(peer, loss)(), MINERS[miner]())
    values = []
    for rows in BATCHES.get(state, [9, 11, 12, 9, 10]):
        mask = torch.rand(rows) < 0.6 if state == "enqueue_mask" else None
        values.append(assert_equal_step(ours, theirs, *draw(rows), enqueue_mask=mask))
    assert any(values), "nothing was compared"


@pytest.mark.parametrize(
    ("margins", "distance"),
    [(None, None), *itertools.product(((0.5, 1.2), (0.0, 0.3)), (LpDistance(), CosineSimilarity()))],
)
@pytest.mark.parametrize("temperature", [pytest.param(0.3, marks=pytest.mark.slow), 0.04])
@pytest.mark.parametrize("loss", BLOCKWISE)
@pytest.mark.usefixtures("ways_to_read", "unchecked")
def test_the_blockwise_way_gives_pmls_numbers(loss, temperature, margins, distance):
    ours, theirs = both(loss(temperature=temperature), margins and PairMarginMiner(*margins, distance=distance))
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
        lambda z: losses.nt_xent(z, labels, queue, temperature=0.4, miner=margin, self_indices=slots), (embeddings,)
    )


@pytest.mark.usefixtures("unchecked")
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


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("adaptation", ["xbn", "axbn"])
@pytest.mark.parametrize("miner", [None, PairMarginMiner(0.2, 1.2)])
@pytest.mark.parametrize("loss", [*BLOCKWISE, peer.ContrastiveLoss])
def test_xbn_equals_pmls_loss_on_the_adapted_memory(loss, miner, adaptation):
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
    "learned temperature": (peer.SupConLoss(temperature=nn.Parameter(torch.tensor(0.2).double())), None),
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
