"""The gradient by the moments of the batch: against finite differences, plain autograd and a closed form."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.miners import PairMarginMiner
from pytorch_metric_learning.reducers import MeanReducer
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch._subclasses.fake_tensor import FakeTensorMode

from selfsup_xbn import CrossBatchMemory, FeatureQueue
from selfsup_xbn.errors import UserError
from selfsup_xbn.losses import PairMargin, info_nce, nt_xent, sup_con
from selfsup_xbn.losses.functional import unit_rows

MINER = PairMargin(0.2, 1.2)
SIZES = [(8, 40, 5, 3), (7, 23, 6, 9), (5, 64, 3, 1), (6, 6, 4, 2), (3, 2, 4, 3)]
"""Batch, rows, dimensions, batches before this one. The queue is partly filled, full, or as large as the batch."""


def state(batch, rows, dim, before, adaptation="xbn", dtype=torch.float64):
    """Return a queue before a step, and the embeddings, keys and labels of the step."""
    queue = FeatureQueue(rows, dim, adaptation, labels=True, dtype=dtype)
    for number in range(before):
        z = unit_rows(torch.randn(batch, dim, dtype=dtype) + number)
        queue.adapt(z)
        queue.enqueue(z, torch.arange(batch) % 3)
    q, k = torch.randn(2, batch, dim, dtype=dtype).unbind()
    return queue, q + 0.5, k + 0.5, torch.arange(batch) % 3


def loss_of(name, embeddings, adapted, queue, keys, labels, taken=None, temperature=0.3, **options):
    """Adapt a copy of the queue to a batch, enqueue ``taken``, and return the loss of the embeddings against it."""
    queue = copy.deepcopy(queue)
    queue.adapt(adapted.detach())
    slots = queue.enqueue((adapted if taken is None else taken).detach(), labels)
    if name == "info_nce":
        return info_nce(embeddings, keys, queue, temperature, slots, **options)
    if name == "all pairs":
        return sup_con(embeddings, labels, queue, temperature=temperature, self_indices=slots, **options)
    function = {"sup_con": sup_con, "nt_xent": nt_xent}[name]
    return function(embeddings, labels, queue, temperature=temperature, miner=MINER, self_indices=slots, **options)


LOSSES = ["info_nce", "sup_con", "nt_xent", "all pairs"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_blockwise_equals_autograd_through_the_rows(name, size):
    queue, e, keys, labels = state(*size)
    gradients, values = [], []
    for options in ({"implementation": "blockwise"}, {"implementation": "dense"}):
        embeddings = e.clone().requires_grad_()
        z = unit_rows(embeddings)
        values.append(loss_of(name, z, z, queue, keys, labels, adapted_to=z, **options))
        gradients.append(torch.autograd.grad(values[-1], embeddings)[0])
    constants = loss_of(name, unit_rows(e), unit_rows(e), queue, keys, labels, implementation="blockwise")
    assert torch.equal(values[0].detach(), constants)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.3, 0.02])
@pytest.mark.parametrize("name", ["info_nce", "sup_con", "nt_xent"])
def test_gradient_equals_finite_differences_of_the_queue(name, temperature):
    """Move one embedding: the anchor moves, and the queue is adapted to the moved batch, but takes the unmoved rows."""
    queue, e, keys, labels = state(6, 40, 4, 4)
    z = unit_rows(e)
    moved = z.clone().requires_grad_()
    options = {"temperature": temperature, "taken": z}
    loss_of(name, moved, z, queue, keys, labels, adapted_to=moved, **options).backward()
    step = 1e-6
    for i, d in [(0, 0), (3, 2), (5, 3)]:
        shift = torch.zeros_like(z)
        shift[i, d] = step
        above, below = (
            loss_of(name, z + sign * shift, z + sign * shift, queue, keys, labels, **options) for sign in (1, -1)
        )
        # unit_rows, inside the loss, makes moved anchors unit rows again, as its gradient does
        assert moved.grad[i, d].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5, abs=1e-8)


def test_closed_form_of_the_gradient():
    """S0, S1 and dL/dz from the coefficients g of the cosines, for SupCon with a miner."""
    queue, e, _, labels = state(8, 40, 5, 3)
    z = unit_rows(e)
    queue.adapt(z)
    slots = queue.enqueue(z, labels)
    rows, row_labels = queue.features(), queue.labels[: len(queue)]
    cosines = (z @ F.normalize(rows, dim=1).T).requires_grad_()
    same, t = labels[:, None] == row_labels, 0.3
    distance = (2 - 2 * cosines.detach()).clamp(min=0).sqrt()
    own = torch.zeros_like(same).scatter_(1, slots[:, None], True)
    positive, negative = same & (distance > MINER.positive) & ~own, ~same & (distance < MINER.negative)
    logsumexp = (cosines / t).masked_fill(~(positive | negative), -1e30).logsumexp(1)
    losses = logsumexp - (cosines * positive).sum(1) / positive.sum(1).clamp(min=1) / t
    counts = (losses > 0) & positive.any(1) & ((positive | negative).sum(1) > 1)
    (losses * counts).sum().div(counts.sum()).backward()

    old = torch.ones(len(rows), dtype=torch.bool)
    old[slots] = False
    n = rows[old].norm(dim=1)
    u, g, c = rows[old] / n[:, None], cosines.grad[:, old], cosines.detach()[:, old]
    w, a = (g * c).sum(0), g @ u
    s0 = ((g / n).sum(1)[:, None] * z).sum(0) - ((w / n)[:, None] * u).sum(0)
    s1 = (z * a).sum(0) - (w[:, None] * u * u).sum(0)
    m, s, b = z.mean(0), z.std(0), len(z)
    expected = s0 / b + (s1 - m * s0) / s**2 * (z - m) / (b - 1)

    leaf = z.clone().requires_grad_()
    loss = sup_con(z, labels, queue, temperature=t, miner=MINER, self_indices=slots, adapted_to=leaf)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["info_nce", "sup_con"])
def test_float32_and_small_blocks(name, monkeypatch):
    """Blocks of five rows, so that some have rows of the batch, some have not, and one has both."""
    queue, e, keys, labels = state(8, 61, 5, 12, dtype=torch.float32)
    monkeypatch.setattr("selfsup_xbn.losses.pairs.block_rows", lambda anchors, queue: 5)
    gradients = []
    for implementation in ("blockwise", "dense"):
        z = unit_rows(e).requires_grad_()
        loss_of(name, z, z, queue, keys, labels, adapted_to=z, implementation=implementation).backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    z = unit_rows(e).requires_grad_()
    loss_of(name, z, z, queue, keys, labels).backward()
    assert (z.grad - gradients[0]).norm() > 0.05 * z.grad.norm()  # the gradient is another than that of constants


@pytest.mark.parametrize("implementation", ["blockwise", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_constants_to_the_bit(dtype, implementation):
    queue, e, keys, labels = state(8, 61, 5, 12, dtype=dtype)
    for name in LOSSES:
        z, keys = e.double(), keys.double()  # of another dtype than the rows
        with_gradient, without = (
            loss_of(name, z, z, queue, keys, labels, adapted_to=adapted, implementation=implementation)
            for adapted in (z, None)
        )
        assert torch.equal(with_gradient, without)


def test_constant_dimensions_and_single_rows():
    queue, e, keys, labels = state(6, 40, 4, 3)
    e[:, 2] = 0  # constant in the batch: no gradient by its deviation
    z = e.clone().requires_grad_()
    loss_of("info_nce", z, z, queue, keys, labels, adapted_to=z).backward()
    assert z.grad.isfinite().all()

    for before in (3, 1):  # a single row adapts nothing
        queue, e, keys, labels = state(1, 40, 4, before)
        z = e.clone().requires_grad_()
        gradients = [
            torch.autograd.grad(loss_of("info_nce", z, z, queue, keys, labels, adapted_to=other), z)[0]
            for other in (z, None)
        ]
        assert torch.equal(*gradients)
    queue, e, keys, labels = state(1, 40, 4, 1)  # nor is a queue of a single row
    batch = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    keys, labels = torch.randn(5, 4, dtype=torch.float64), torch.arange(5)
    gradients = [
        torch.autograd.grad(loss_of("info_nce", batch, batch, queue, keys, labels, adapted_to=other), batch)[0]
        for other in (batch, None)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("adaptation", ["xbm", "axbn"])
def test_a_queue_that_does_not_follow_is_refused(adaptation):
    queue, e, keys, labels = state(6, 40, 4, 2, adaptation)
    with pytest.raises(UserError, match="expected an adaptation that moves the rows to the moments of the batch"):
        loss_of("sup_con", e, e, queue, keys, labels, adapted_to=e)


def test_the_kernels_do_not_follow():
    queue, e, keys, labels = state(6, 40, 4, 2)
    with pytest.raises(UserError, match="rows that are constants"):
        loss_of("sup_con", e, e, queue, keys, labels, adapted_to=e, implementation="triton")


PEERS = {
    "blockwise": (peer.SupConLoss(0.3), PairMarginMiner(0.2, 1.2), "sup_con"),
    "of PML": (peer.SupConLoss(0.3, reducer=MeanReducer()), None, None),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PEERS)
def test_drop_in_equals_pml_on_rows_that_follow(name, masked):
    """PML's loss on Eq. 6 in plain autograd, where the rows of the batch are constants."""
    loss, miner, _ = PEERS[name]
    memory = CrossBatchMemory(loss, 5, 40, miner=miner, moment_gradient=True)
    for number in range(3):
        memory(torch.randn(8, 5, dtype=torch.float64) + number, torch.arange(8) % 3)
    before, labels = memory.queue.features(), torch.arange(8) % 3
    embeddings = (torch.randn(8, 5, dtype=torch.float64) + 0.5).requires_grad_()
    mask = torch.arange(8) % 2 == 0 if masked else None
    value = memory(embeddings, labels, enqueue_mask=mask)
    gradient = torch.autograd.grad(value, embeddings)[0]

    new = embeddings if mask is None else embeddings[mask]
    anchors, anchor_labels = (embeddings, labels) if mask is None else (embeddings[~mask], labels[~mask])
    moved = (before - before.mean(0)) / before.std(0) * new.std(0) + new.mean(0)
    rows = torch.cat([moved, new.detach()])
    row_labels = torch.cat([torch.arange(8).repeat(3) % 8 % 3, labels if mask is None else labels[mask]])
    pairs = lmu.get_all_pairs_indices(anchor_labels, row_labels) if miner is None else None
    if miner is not None:
        pairs = miner(anchors, anchor_labels, rows, row_labels)
    if mask is None:  # without pairs of an anchor with its own row
        kept = pairs[1] != 24 + pairs[0]
        pairs = (pairs[0][kept], pairs[1][kept], *pairs[2:])
    expected = loss(anchors, anchor_labels, pairs, rows, row_labels)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, embeddings)[0], rtol=1e-8, atol=1e-10)


def test_drop_in_refuses_a_memory_that_does_not_follow():
    with pytest.raises(UserError, match="the moment gradient: expected an adaptation"):
        CrossBatchMemory(peer.SupConLoss(), 5, 40, adaptation="axbn", moment_gradient=True)

    class Normalized(CrossBatchMemory):
        @property
        def embedding_memory(self):
            return F.normalize(super().embedding_memory, dim=1)

    with pytest.raises(UserError, match="moment_gradient: expected the embedding_memory of CrossBatchMemory"):
        Normalized(peer.SupConLoss(), 5, 40, moment_gradient=True)


@pytest.mark.parametrize("implementation", ["auto", "dense"])
@pytest.mark.parametrize("function", [sup_con, nt_xent])
def test_no_loss_waits_for_a_cuda_device(function, implementation):
    with FakeTensorMode():  # refuses what reads a value of a tensor
        queue = FeatureQueue(600, 8, "xbn", labels=True, device="cuda")
        z, labels = torch.randn(25, 8, device="cuda", requires_grad=True), torch.zeros(25, dtype=int, device="cuda")
        queue.adapt(z)
        slots = queue.enqueue(z, labels)
        value = function(z, labels, queue, miner=MINER, self_indices=slots, adapted_to=z, implementation=implementation)
        assert (value.device.type, value.shape) == ("cuda", ())


def test_the_path_of_an_accelerator_gives_the_same_gradient(monkeypatch):
    queue, e, keys, labels = state(8, 61, 5, 12)
    gradients = []
    for fixed_shapes in (False, True):  # all slots are read, in eight blocks
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda fixed_shapes=fixed_shapes: fixed_shapes)
        z = unit_rows(e).requires_grad_()
        loss_of("sup_con", z, z, queue, keys, labels, adapted_to=z).backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
