"""The drop-ins for lightly: its own numbers without adaptation, the paper's with it, and what is mended."""

import copy
from collections import deque

import lightly.loss
import lightly.models.modules.memory_bank
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from integrations.lightly_helpers import assert_same_state, pair, seeded, state
from integrations.moco_program import DIM, MoCo, train
from reference import ReferenceQueue
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from selfsup_xbn import MemoryBankModule, NTXentLoss
from selfsup_xbn.errors import UserError

ADAPTATIONS = ["xbm", "xbn", "axbn"]
PeerLoss = lightly.loss.NTXentLoss
PeerBank = lightly.models.modules.memory_bank.MemoryBankModule


def literal(q, k, rows, temperature):
    """InfoNCE as a cross entropy in float64."""
    unit, keys, negatives = (F.normalize(tensor.double(), dim=1) for tensor in (q, k, rows))
    logits = torch.cat([(unit * keys).sum(1, keepdim=True), unit @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


# ---------------------------------------------------------------------------------------------------- lightly's numbers


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("size", [(7, 3), (0, 3), 0])
@pytest.mark.filterwarnings("ignore:adaptation=")
def test_new_bank_and_generator_equal_lightlys_bit_for_bit(adaptation, size):
    ours, draw = seeded(MemoryBankModule, size, adaptation=adaptation), torch.rand(3)
    peer, peer_draw = seeded(PeerBank, size), torch.rand(3)
    assert ours.size == peer.size
    assert torch.equal(ours.bank, peer.bank)
    assert torch.equal(draw, peer_draw)


@pytest.mark.parametrize("key_grad", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-9)])
def test_xbm_equals_lightly_over_three_passes_of_the_bank(dtype, tolerance, temperature, key_grad):
    ours = seeded(NTXentLoss, temperature, (32, DIM), adaptation="xbm", dtype=dtype)
    peer = seeded(PeerLoss, temperature, (32, DIM)).to(dtype)
    # Drawn in float32, lightly's rows have length 1 to 1e-7; ours are read as exactly unit vectors.
    peer.memory_bank.bank = F.normalize(peer.memory_bank.bank, dim=1)
    for _ in range(12):
        inputs = pair(dtype=dtype, key_grad=key_grad)
        asked = [tensor for tensor in inputs if tensor.requires_grad]
        values = [ours(*inputs), peer(*inputs)]
        torch.testing.assert_close(*values, rtol=tolerance, atol=tolerance)
        for found, expected in zip(*[torch.autograd.grad(value, asked) for value in values], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.memory_bank.bank, peer.memory_bank.bank, rtol=0, atol=tolerance)


@pytest.mark.parametrize("feature_dim_first", [False, True])
def test_xbm_bank_module_returns_what_lightlys_returns(feature_dim_first):
    ours = seeded(MemoryBankModule, (12, 3), feature_dim_first=feature_dim_first, adaptation="xbm")
    peer = seeded(PeerBank, (12, 3), feature_dim_first=feature_dim_first)
    for step in range(10):
        batch = torch.randn(4, 3, requires_grad=True) * 5  # of any length: nothing is normalized
        given = [bank(batch, None, update=step % 3 != 1) for bank in (ours, peer)]
        assert all(output is batch for output, _ in given)
        assert torch.equal(given[0][1], given[1][1])
        assert not given[0][1].requires_grad


def test_without_a_bank_it_is_lightlys_class():
    q, k = pair(key_grad=True)
    values = [make(temperature=0.2)(q, k) for make in (NTXentLoss, PeerLoss)]
    assert torch.equal(*values)
    for found, expected in zip(*[torch.autograd.grad(value, (q, k)) for value in values], strict=True):
        assert torch.equal(found, expected)
    assert MemoryBankModule(0)(q, update=True) == (q, None)
    assert not NTXentLoss().state_dict()


def test_the_bank_stays_as_it_is_for_queries_without_gradient():
    ours, peer = seeded(NTXentLoss, 0.1, (32, DIM), adaptation="xbm"), seeded(PeerLoss, 0.1, (32, DIM))
    other = NTXentLoss(0.1, (32, DIM), adaptation="axbn")
    for criterion in (ours, peer, other):
        criterion(*seeded(pair))
    before = [state(ours), state(other)]
    q, k = pair()
    with torch.no_grad():
        torch.testing.assert_close(ours(q.detach(), k), peer(q.detach(), k), rtol=1e-6, atol=1e-6)
        other(q.detach(), k)
    assert_same_state(before[0], state(ours))
    assert_same_state(before[1], state(other))


@pytest.mark.parametrize("batch", [pytest.param(8, marks=pytest.mark.slow), 10])
def test_moco_program_has_lightlys_loss_until_lightly_drops_rows(batch):
    def curve(criterion):
        return train(MoCo(criterion).double(), range(12), batch, torch.float64)

    ours = curve(seeded(NTXentLoss, 0.2, (32, DIM), adaptation="xbm", dtype=torch.float64))
    peer = seeded(PeerLoss, 0.2, (32, DIM)).double()
    peer.memory_bank.bank = F.normalize(peer.memory_bank.bank, dim=1)
    apart = np.abs(np.subtract(ours, curve(peer)))
    if batch == 8:
        assert apart.max() < 1e-9
    else:  # step 3 passes the end with 2 of its 10 rows, which lightly drops: step 4 is the first that could see them
        assert apart[:4].max() < 1e-9
        assert apart[4:].min() > 1e-6


# -------------------------------------------------------------------------------------------------- the paper's numbers


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_value_and_gradient_equal_the_equations_in_lightlys_order(adaptation):
    temperature, size = 0.2, 21
    ours = NTXentLoss(temperature, (size, DIM), adaptation=adaptation)
    reference = ReferenceQueue(size, adaptation)
    reference.enqueue(ours.memory_bank.bank.double().numpy())
    for _ in range(9):
        q, k = pair()
        loss = ours(q, k)
        keys = F.normalize(k.detach().double(), dim=1)
        reference.adapt(keys.numpy())
        anchors = q.detach().double().requires_grad_()
        expected = literal(anchors, keys, torch.tensor(np.stack(reference.rows)), temperature)
        reference.enqueue(keys.numpy())
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(value, of)[0].double() for value, of in ((loss, q), (expected, anchors))]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adaptation", ["xbn", "axbn"])
def test_bank_module_returns_rows_adapted_before_enqueue(adaptation):
    ours, reference = MemoryBankModule((10, 3), adaptation=adaptation), ReferenceQueue(10, adaptation)
    reference.enqueue(ours.bank.double().numpy())
    slot = 0
    for _ in range(6):
        batch = torch.randn(4, 3) * 3 + 1
        negatives = ours(batch, update=True)[1]
        reference.adapt(batch.numpy())
        expected = np.roll(np.stack(reference.rows), slot, axis=0)
        np.testing.assert_allclose(negatives.T, expected, rtol=1e-4, atol=1e-5)
        reference.enqueue(batch.numpy())
        slot = (slot + 4) % 10
    np.testing.assert_allclose(ours.bank, np.roll(np.stack(reference.rows), slot, axis=0), rtol=1e-4, atol=1e-5)


def test_random_rows_take_the_moments_of_the_first_keys():
    bank, keys = MemoryBankModule((500, 4)), torch.randn(16, 4) * torch.tensor([0.1, 1, 3, 9]) + 7
    rows = bank(keys, update=True)[1].T
    torch.testing.assert_close(rows.mean(0), keys.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.std(0), keys.std(0), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- what is mended


def test_a_batch_that_passes_the_end_loses_nothing():
    bank, last = MemoryBankModule((10, 2), adaptation="xbm", feature_dim_first=False), deque(maxlen=10)
    last.extend(bank.bank.tolist())
    for batch in torch.randn(9, 4, 2):
        bank(batch, update=True)
        last.extend(batch.tolist())
        assert sorted(bank.bank.tolist()) == sorted(last)
    bank(batch := torch.randn(13, 2), update=True)
    assert sorted(bank.bank.tolist()) == sorted(batch[-10:].tolist())


def test_a_batch_that_is_not_finite_does_not_poison_the_bank():
    criterion = NTXentLoss(0.1, (16, DIM))
    q, k = pair()
    k[2, 1] = torch.nan
    assert criterion(q, k).isnan()
    assert criterion(*pair()).isfinite()
    assert criterion.memory_bank.bank.isfinite().all()


def test_a_symmetric_loss_meets_no_view_of_the_same_image():
    pairs = [pair(), pair()]
    criterion = seeded(NTXentLoss, 0.1, (32, DIM), adaptation="xbm")
    together = criterion.symmetric(*pairs)
    alone = [seeded(NTXentLoss, 0.1, (32, DIM), adaptation="xbm")(*given) for given in pairs]
    torch.testing.assert_close(together, sum(alone) / 2)
    keys = F.normalize(torch.cat([k for _, k in pairs]), dim=1)
    torch.testing.assert_close(criterion.memory_bank.bank[:16], keys)

    twice, peer = seeded(NTXentLoss, 0.1, (32, DIM), adaptation="xbm"), seeded(PeerLoss, 0.1, (32, DIM))
    separate = [[loss(*given) for given in pairs] for loss in (twice, peer)]
    torch.testing.assert_close(*separate)  # two calls do what they do in lightly:
    assert separate[0][1] > alone[1] + 1e-3  # the second has the first one's keys among its negatives


def test_a_symmetric_loss_adapts_to_all_keys_at_once():
    pairs = [pair(), pair()]
    criterion, twin = (seeded(NTXentLoss, 0.1, (32, DIM)) for _ in range(2))
    twin.memory_bank.queue.adapt(F.normalize(torch.cat([k for _, k in pairs]), dim=1))
    expected = sum(literal(q, k, twin.memory_bank.bank, 0.1) for q, k in pairs) / 2
    torch.testing.assert_close(criterion.symmetric(*pairs).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_symmetric_loss_without_a_bank_is_the_mean_of_lightlys():
    pairs = [pair(), pair()]
    expected = sum(PeerLoss(0.1)(*given) for given in pairs) / 2
    torch.testing.assert_close(NTXentLoss(0.1).symmetric(*pairs), expected)


class NewStorages(TorchDispatchMode):
    """Elements of the largest tensor that an operation made and that is no view of one given to it."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        return made


def test_a_step_makes_nothing_of_the_banks_size(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # a block is larger where there are more
    size, made = 200_000, {}
    for make in (NTXentLoss, PeerLoss):
        criterion = make(0.1, (size, DIM))
        with NewStorages() as storages:
            criterion(*pair(batch=16)).backward()
        made[make] = storages.largest
    assert made[NTXentLoss] < size * min(DIM, 16) / 4
    assert made[PeerLoss] >= size * DIM


def test_no_step_waits_for_the_device():
    def step(make):
        with FakeTensorMode(), torch.device("cuda"):  # a tensor whose value is asked for raises
            q, k = torch.randn(8, DIM, requires_grad=True), torch.randn(8, DIM)
            return make((50, DIM))(q, k)

    for adaptation in ADAPTATIONS:
        assert step(lambda size, name=adaptation: NTXentLoss(0.1, size, adaptation=name)).requires_grad
        step(lambda size, name=adaptation: lambda q, k: MemoryBankModule(size, adaptation=name)(q, update=True))
    with pytest.raises(DataDependentOutputException):
        step(lambda size: PeerLoss(0.1, size))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_has_the_cpus_numbers_without_waiting():
    criterion = NTXentLoss(0.1, (40, DIM), adaptation="axbn")
    on_gpu = copy.deepcopy(criterion).cuda()
    for step in range(12):
        q, k = pair(key_grad=True)
        expected = criterion(q, k)
        q_gpu, k_gpu = q.detach().cuda().requires_grad_(), k.detach().cuda()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        loss = on_gpu(q_gpu, k_gpu)
        loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert_same_state(state(on_gpu.cpu()), state(criterion), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("make", [MemoryBankModule, lambda size: NTXentLoss(0.1, size)])
@pytest.mark.parametrize("size", [-1, 4096, (8, -1), (8,), (8, 2, 2), 0.0, (8.0, 2), ("8", 2), "82", None])
def test_a_size_that_is_none_is_named(make, size, unchecked):
    with pytest.raises(UserError, match=r"\(num_features, dim\)"):
        make(size)


@pytest.mark.parametrize("size", [(np.int64(8), np.int64(2)), [8, 2], np.array([8, 2]), torch.Size([8, 2])])
def test_sizes_may_be_any_integers(size, unchecked):
    assert MemoryBankModule(size).bank.shape == (8, 2)
    assert MemoryBankModule(size[0] * 0).queue is None


def test_other_faults_are_named():
    with pytest.raises(UserError, match="dim=0"):
        MemoryBankModule((8, 0))
    with pytest.raises(UserError, match="did you mean xbn"):
        NTXentLoss(0.1, (8, 2), adaptation="xbnn")
    with pytest.raises(UserError, match="temperature above 0, got -1"):
        NTXentLoss(-1.0, (8, 2))(torch.randn(2, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="1e-8"):
        NTXentLoss(0.0)
    with pytest.raises(ValueError, match=r"\[B, 2\], got \[4, 3\]"):
        MemoryBankModule((8, 2))(torch.randn(4, 3), update=True)


def test_a_loss_may_be_built_on_the_bank_as_on_lightlys():
    class Nearest(MemoryBankModule):
        def forward(self, output, update=False):
            output, bank = super().forward(output, update=update)
            return bank.T[(F.normalize(output, dim=1) @ F.normalize(bank, dim=0)).argmax(1)]

    nearest, batch = Nearest((10, 3), adaptation="xbm"), torch.randn(4, 3)
    nearest(batch, update=True)
    torch.testing.assert_close(nearest(batch), batch)
