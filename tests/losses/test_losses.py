"""The losses, dense, blockwise and compiled, against float64 matrices, lightly and PML."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import NTXentLoss
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
from pytorch_metric_learning.miners import PairMarginMiner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import selfsup_xbn
from selfsup_xbn import FeatureQueue
from selfsup_xbn.errors import UserError
from selfsup_xbn.losses import PairMargin, info_nce, nt_xent, sup_con
from tests.fixtures import without_checks

D = 12
CENTERS = torch.randn(6, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MINERS = {
    "none": (None, None),
    "euclidean": (PairMargin(0.7, 1.1), PairMarginMiner(0.7, 1.1)),
    "paper": (PairMargin(), PairMarginMiner(0.2, 0.8)),
    "cosine": (PairMargin(0.7, 0.3, "cosine"), PairMarginMiner(0.7, 0.3, distance=CosineSimilarity())),
}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
LOSSES = ("info_nce", "sup_con", "nt_xent")


@pytest.fixture(params=["dense", "blockwise", "fixed shapes"])
def implementation(request, monkeypatch):
    """The matrix; blocks of a CPU, where shapes may depend on values; eight blocks, where none does."""
    if request.param == "fixed shapes":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        return "blockwise"
    return request.param


def draw(n, dtype=torch.float64, classes=6):
    labels = torch.randint(0, classes, (n,))
    return (CENTERS[labels % len(CENTERS)] + 0.7 * torch.randn(n, D, dtype=torch.float64)).to(dtype), labels


def filled_queue(rows, size=60, adaptation="xbm", dtype=torch.float64, classes=6, labels=True):
    queue = FeatureQueue(size, D, adaptation, labels=labels, dtype=dtype)
    step = max(15, size // 4)
    for start in range(0, rows, step):
        z, y = draw(min(step, rows - start), torch.float64, classes)
        queue.adapt(z)
        queue.enqueue(z, y if labels else None)
    return queue


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def loss_of(name, z, y, queue, temperature=0.1, self_indices=None, miner=None, **kwargs):
    """Any of the losses; the keys of InfoNCE are other embeddings of the batch."""
    if name == "info_nce":
        return info_nce(z, z.flip(0), queue, temperature, self_indices, **kwargs)
    function = {"sup_con": sup_con, "nt_xent": nt_xent}[name]
    return function(z, y, queue, temperature=temperature, miner=miner, self_indices=self_indices, **kwargs)


def expected_loss(name, z, y, queue, temperature=0.1, self_indices=None, miner=None):
    """The same in float64, anchor by anchor, pair by pair."""
    z, rows = F.normalize(z.double(), dim=1), F.normalize(queue.features().double(), dim=1)
    keys, terms = z.flip(0), []
    for i, anchor in enumerate(z):
        own = [] if self_indices is None else self_indices[i].flatten().tolist()
        others = [j for j in range(len(rows)) if j not in own]
        s, distance = (
            rows[others] @ anchor / temperature,
            torch.linalg.vector_norm(rows[others] - anchor.detach(), dim=1),
        )
        if name == "info_nce":
            positive = keys[i] @ anchor / temperature
            terms.append(torch.cat([positive[None], s]).logsumexp(0) - positive)
            continue
        same, distance = queue.labels[others] == y[i], (rows[others] - anchor.detach()).norm(dim=1)
        far, near = (True, True) if miner is None else (distance > miner.positive, distance < miner.negative)
        terms.append((s[same & far], s[~same & near]))
    if name == "info_nce":
        return torch.stack(terms).mean()
    zero = z.sum() * 0
    if name == "nt_xent":
        pairs = [torch.cat([p[None], n]).logsumexp(0) - p for positive, n in terms for p in positive]
        return torch.stack(pairs).mean() if pairs else zero
    if not any(len(n) for _, n in terms):
        return zero
    losses = [torch.cat(pair).logsumexp(0) - pair[0].mean() for pair in terms if len(pair[0])]
    losses = [loss for loss in losses if loss > 1e-14]
    return torch.stack(losses).mean() if losses else zero


# ------------------------------------------------------------------------------------------------------ against float64


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rows", [0, 7, 45, 60, 97])
@pytest.mark.parametrize("temperature", [0.1, pytest.param(0.02, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("loss", "miner"), [("info_nce", None), *itertools.product(("sup_con", "nt_xent"), (None, PairMargin(0.7, 1.1)))]
)
def test_loss_and_gradient_equal_the_float64_formula(loss, temperature, miner, rows, implementation):
    queue = filled_queue(rows, 61, "xbn")
    z, y = draw(13)
    y[0] = 99  # an anchor with itself alone
    queue.adapt(z)
    slots = queue.enqueue(z, y)
    z.requires_grad_()
    value = loss_of(loss, z, y, queue, temperature, slots, miner, implementation=implementation)
    expected = expected_loss(loss, z, y, queue, temperature, slots, miner)
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(gradient(value, z), gradient(expected, z), rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
@pytest.mark.parametrize(
    ("loss", "miner", "classes"),  # many rows of each class, or few
    [("info_nce", None, 3), *itertools.product(("sup_con", "nt_xent"), (None, PairMargin(0.3, 0.9)), (3, 2000))],
)
def test_blockwise_is_as_near_to_float64_as_dense(loss, temperature, miner, dtype, classes):
    queue = filled_queue(3500, 3001, "xbn", dtype, classes)  # six blocks at one thread
    z, y = draw(97, torch.float32, classes)
    z.requires_grad_()
    exact = FeatureQueue(3001, D, "xbm", labels=True, dtype=torch.float64)
    exact.enqueue(queue.features().double(), queue.labels)
    wide = z.detach().double().requires_grad_()
    truth = loss_of(loss, wide, y, exact, temperature, miner=miner, implementation="dense")
    (slope,) = gradient(truth, wide)
    errors = []
    for way in ("blockwise", "dense"):
        value = loss_of(loss, z, y, queue, temperature, miner=miner, implementation=way)
        by_z = gradient(value, z)[0].double()
        errors.append(((value.double() - truth).abs() / truth, (by_z - slope).abs().max() / slope.abs().max()))
    for blockwise, dense in zip(*errors, strict=True):
        assert blockwise < max(2 * dense, 5e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_anchor_meets_none_of_several_own_rows(loss, implementation):
    queue = filled_queue(30)
    z, y = draw(4)
    own = torch.stack([queue.enqueue(z, y), queue.enqueue(*draw(4)), torch.tensor([3, -1, 0, -1])], dim=1)
    value = loss_of(loss, z, y, queue, self_indices=own, implementation=implementation)
    torch.testing.assert_close(value, expected_loss(loss, z, y, queue, self_indices=own), **CLOSE)


@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 50),
    st.sampled_from(LOSSES),
    st.sampled_from([0.05, 0.5, 5.0]),
)
def test_any_sizes_give_the_float64_formula(batch, size, rows, loss, temperature):
    with without_checks():
        queue = filled_queue(rows, size, "xbn")
        z, y = draw(batch)
        slots = queue.enqueue(z, y)
        expected = expected_loss(loss, z, y, queue, temperature, slots)
        for way in ("dense", "blockwise"):
            value = loss_of(loss, z, y, queue, temperature, slots, implementation=way)
            torch.testing.assert_close(value, expected, **CLOSE)


@settings(max_examples=40)
@given(st.sampled_from(LOSSES), st.floats(0.01, 100))
def test_lengths_order_and_class_names_do_not_matter(loss, length):
    queue, (z, y) = filled_queue(60), draw(9)
    value, order = loss_of(loss, z, y, queue), torch.randperm(60)
    moved = FeatureQueue(60, D, "xbm", labels=True, dtype=torch.float64)
    moved.enqueue(queue.features()[order] * 3, queue.labels[order] + 7)
    torch.testing.assert_close(loss_of(loss, z * length, y + 7, moved), value, **CLOSE)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_passes_gradcheck(loss):
    queue = filled_queue(60, adaptation="xbn")
    z, y = draw(6)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_of(loss, z, y, queue, 0.3, miner=PairMargin(0.3, 1.2)), (z,))
    k = (z.detach() + 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, k: info_nce(z, k, queue, 0.3), (z, k))


# ---------------------------------------------------------------------------------------------------- against the peers


@pytest.mark.parametrize("temperature", [0.03, 0.07, 0.5])
def test_info_nce_with_xbm_equals_lightlys(temperature, implementation):
    theirs = NTXentLoss(temperature, memory_bank_size=(64, D))
    queue = FeatureQueue(64, D, "xbm")
    queue.enqueue(theirs.memory_bank.bank)
    q, k = torch.randn(16, D, requires_grad=True), torch.randn(16, D, requires_grad=True)
    value, expected = info_nce(q, k, queue, temperature, implementation=implementation), theirs(q, k)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(value, q, k), gradient(expected, q, k), rtol=1e-5, atol=1e-6)


def peers_loss(queue, miner, z, y, temperature):
    """PML's loss on a copy of the queue, whose last rows it writes again with the same values."""
    memory = CrossBatchMemory(SupConLoss(temperature), D, queue.size, miner=miner)
    empty = queue.size - len(queue)
    memory.embedding_memory = F.pad(queue.features(), (0, 0, 0, empty))
    memory.label_memory = F.pad(queue.labels[: len(queue)], (0, empty))
    memory.queue_idx, memory.has_been_filled = (int(queue.pointer) - len(z)) % queue.size, not empty
    return memory(z, y)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("rows", [0, 15, 60, 90])
def test_sup_con_equals_pmls(miner, rows, implementation):
    ours, theirs = MINERS[miner]
    for lonely, temperature in itertools.product((False, True), (0.1, 0.04)):
        queue, (z, y) = filled_queue(rows), draw(15)
        if lonely:  # classes of one member
            y[:4] = torch.arange(100, 104)
        slots = queue.enqueue(z, y)
        z.requires_grad_()
        expected = peers_loss(queue, theirs, z, y, temperature)
        value = loss_of("sup_con", z, y, queue, temperature, slots, ours, implementation=implementation)
        torch.testing.assert_close(value, expected, **CLOSE)
        torch.testing.assert_close(gradient(value, z), gradient(expected, z), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("miner", MINERS)
def test_sup_con_in_the_batch_equals_pmls(miner):
    ours, theirs = MINERS[miner]
    z, y = draw(20)
    z.requires_grad_()
    expected = SupConLoss(0.1)(z, y, theirs(z, y) if theirs else None)
    value = sup_con(z, y, temperature=0.1, miner=ours)
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(gradient(value, z), gradient(expected, z), rtol=1e-7, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("labels", [torch.zeros(8, dtype=torch.int64), torch.arange(8)], ids=["one class", "no pairs"])
def test_nothing_to_learn_is_zero_with_a_zero_gradient(labels, implementation):
    queue, z = FeatureQueue(8, D, "xbm", labels=True), torch.randn(8, D, requires_grad=True)
    slots = queue.enqueue(z, labels)
    for loss in ("sup_con", "nt_xent"):
        value = loss_of(loss, z, labels, queue, self_indices=slots, implementation=implementation)
        assert value.item() == 0
        assert torch.equal(gradient(value, z)[0], torch.zeros_like(z))


@pytest.mark.parametrize("rows", [0, 60])
@pytest.mark.parametrize("loss", [*LOSSES, "in the batch"])
def test_an_empty_batch_is_zero_with_a_zero_gradient(loss, rows, implementation):
    z, y = torch.zeros(0, D, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    if loss == "in the batch":
        value = sup_con(z, y)
    else:
        value = loss_of(loss, z, y, filled_queue(rows), implementation=implementation)
    assert value.item() == 0
    assert gradient(value, z)[0].shape == (0, D)


def test_no_gradient_reaches_the_queue(implementation):
    queue, (z, y) = filled_queue(60), draw(5)
    before = queue.features()
    loss_of("sup_con", z.requires_grad_(), y, queue, implementation=implementation).backward()
    assert torch.equal(queue.features(), before)
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in queue.buffers())


@pytest.mark.parametrize("loss", LOSSES)
def test_only_dense_has_a_second_derivative(loss):
    queue, (z, y) = filled_queue(60), draw(5)
    z.requires_grad_()

    def slope(way):
        value = loss_of(loss, z, y, queue, implementation=way)
        return torch.autograd.grad(value, z, create_graph=True)[0].square().sum()

    assert gradient(slope("dense"), z)[0].isfinite().all()
    with pytest.raises(RuntimeError, match="second derivatives need implementation='dense'"):
        gradient(slope("blockwise"), z)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_give_the_float32_loss(dtype, loss, implementation):
    queue = filled_queue(60, adaptation="xbn", dtype=torch.float32)
    z, y = draw(15, dtype)
    z.requires_grad_()
    exact = z.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss_of(loss, z, y, queue, implementation=implementation)
    expected = loss_of(loss, exact, y, queue, implementation=implementation)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(value, z)[0].float(), gradient(expected, exact)[0], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_float16_gradients_survive_a_loss_scale(loss, implementation):
    queue, (z, y) = filled_queue(60), draw(15)

    def scaled_gradient(dtype, scale):
        leaf = z.to(dtype).requires_grad_()
        value = loss_of(loss, leaf, y, queue, implementation=implementation)
        return gradient(value * scale, leaf)[0].double() / scale

    expected = scaled_gradient(torch.float32, 1.0)
    atol = 2e-3 * expected.abs().max()
    torch.testing.assert_close(scaled_gradient(torch.float16, 65536.0), expected, rtol=0.02, atol=atol)


@pytest.mark.parametrize("length", [1e-20, 1e-13, 1e-12, 2e-12, 1e15])
def test_embeddings_of_any_length_have_the_gradient_of_normalize(length):
    queue, (z, y) = filled_queue(60), draw(15)
    z = (F.normalize(z, dim=1) * length).requires_grad_()
    expected = gradient(expected_loss("sup_con", z, y, queue), z)[0]
    by_z = gradient(sup_con(z, y, queue), z)[0]
    torch.testing.assert_close(by_z * length, expected * length, rtol=1e-6, atol=1e-9)


def test_small_temperatures_neither_overflow_nor_vanish():
    queue, (z, y) = filled_queue(60), draw(15)
    value = info_nce(z.float(), z.float().flip(0), queue, 1e-3)
    torch.testing.assert_close(value.double(), expected_loss("info_nce", z, y, queue, 1e-3), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_labels_of_any_integer_type(dtype, implementation):
    queue, (z, y) = filled_queue(60), draw(9, classes=2)
    for loss in ("sup_con", "nt_xent"):
        value = loss_of(loss, z, y.to(dtype), queue, implementation=implementation)
        assert value == loss_of(loss, z, y, queue, implementation=implementation)
    assert sup_con(z, y.to(dtype)) == sup_con(z, y)


def test_the_number_of_pairs_is_told():
    queue, (z, y) = filled_queue(60), draw(9)
    same = y[:, None] == queue.labels
    far = torch.cdist(F.normalize(z, dim=1), F.normalize(queue.features(), dim=1))
    for loss, way in itertools.product(("sup_con", "nt_xent"), ("dense", "blockwise")):
        counts = []
        miner, record = PairMargin(0.5, 1.0), lambda *numbers, counts=counts: counts.extend(numbers)
        loss_of(loss, z, y, queue, miner=miner, implementation=way, on_pairs=record)
        assert counts == [(same & (far > 0.5)).sum(), (~same & (far < 1.0)).sum()]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_is_above_zero_and_finite(temperature):
    queue, (z, y) = filled_queue(60), draw(4)
    for loss in LOSSES:
        with pytest.raises(UserError, match="temperature above 0"):
            loss_of(loss, z, y, queue, temperature)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    queue, (z, y) = filled_queue(60), draw(4)
    with pytest.raises(UserError, match="'manhattan'"):
        sup_con(z, y, queue, miner=PairMargin(distance="manhattan"))
    with pytest.raises(UserError, match=r"'dense'.*got 'fast'"):
        sup_con(z, y, queue, implementation="fast")
    with pytest.raises(ValueError, match="labels=True"):
        sup_con(z, y, filled_queue(15, labels=False))
    with pytest.raises(ValueError, match=r"whole numbers as labels, got \d\.5"):
        sup_con(z, y + 0.5, queue)
    for loss in ("sup_con", "nt_xent"):
        with pytest.raises(ValueError, match="expected labels for"):
            loss_of(loss, z, y[:3], queue)
    with pytest.raises(ValueError, match="expected k for"):
        info_nce(z, z[:3], queue)
    with pytest.raises(ValueError, match="expected self_indices for"):
        info_nce(z, z, queue, self_indices=torch.arange(3))
    with pytest.raises(ValueError, match=r"shape \[B, 12\]"):
        info_nce(z[:, :5], z[:, :5], queue)


# -------------------------------------------------------------------------------------------- accelerators, compilation


@pytest.mark.parametrize("labels", [True, False])
def test_no_loss_waits_for_a_cuda_device(labels):
    with FakeTensorMode():  # refuses what reads a value of a tensor; has no device for a backward pass
        queue = FeatureQueue(600, D, "xbn", labels=labels, device="cuda")
        z = torch.randn(25, D, device="cuda", requires_grad=True)
        y = torch.zeros(25, dtype=torch.int64, device="cuda")
        queue.adapt(z)
        slots = queue.enqueue(z, y if labels else None)
        for loss, way in itertools.product(LOSSES if labels else LOSSES[:1], ("auto", "dense")):
            value = loss_of(loss, z, y, queue, 0.1, slots, PairMargin(), implementation=way)
            assert (value.device.type, value.shape) == ("cuda", ())


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a program wait for an accelerator: reading a value, and shapes that depend on values."""

    WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = [a for a in args[1] if a is not None and a.dtype == torch.bool] if "index." in str(function) else []
        assert function not in self.WAITS, function
        assert not masks, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("adaptation", ["xbm", "xbn", "axbn"])
def test_no_step_waits_for_the_device(adaptation, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # takes the path of an accelerator
    queue = FeatureQueue(60, D, adaptation, labels=True)
    z, y = draw(25, torch.float32)
    z.requires_grad_()
    with NoWaiting():
        for _ in range(4):
            queue.adapt(z)
            slots = queue.enqueue(z, y)
            sum(loss_of(loss, z, y, queue, 0.1, slots, PairMargin()) for loss in LOSSES).backward()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            len(queue)


def test_what_is_refused_there_is_what_waits():
    for waits in (lambda t: t.sum().item(), lambda t: t.nonzero(), lambda t: t[t > 0]):
        with NoWaiting(), pytest.raises(AssertionError):
            waits(torch.ones(3))


COMPILED = """
import torch
from selfsup_xbn import FeatureQueue
from selfsup_xbn.losses import PairMargin, info_nce, nt_xent, sup_con
queue = FeatureQueue(61, 12, "xbn", labels=True)
z, y = torch.randn(13, 12, requires_grad=True), torch.arange(13) % 5
for _ in range(4):
    queue.adapt(z)
    slots = queue.enqueue(z, y)
for loss in (
    lambda z: info_nce(z, z.flip(0), queue, 0.1, slots),
    lambda z: sup_con(z, y, queue, miner=PairMargin(0.3, 1.2), self_indices=slots),
    lambda z: nt_xent(z, y, queue, self_indices=slots),
):
    values = [loss(z), torch.compile(loss, fullgraph=True, backend="aot_eager")(z)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in values))
"""


@pytest.mark.slow
def test_a_loss_compiles_without_a_graph_break():
    # Not in this process: the checks of annotations cannot be compiled.
    env = os.environ | {"PYTHONPATH": str(Path(selfsup_xbn.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", COMPILED], env=env, check=True, timeout=300)
