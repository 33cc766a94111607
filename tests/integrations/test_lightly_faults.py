"""The drop-ins for lightly in programs that touch what they are made of, and under lightly's other losses."""

import warnings

import lightly.loss
import lightly.models.modules.memory_bank
import pytest
import torch
import torch.nn.functional as F
from integrations.lightly_helpers import assert_same_state, pair, seeded, state
from integrations.moco_program import DIM
from lightly.loss import DirectCLRLoss
from lightly.loss.regularizer import CO2Regularizer
from lightly.models.modules import NNMemoryBankModule as PeerNearest
from torch import nn

from selfsup_xbn import AXBN, XBN, MemoryBankModule, NNMemoryBankModule, NTXentLoss
from selfsup_xbn.errors import UserError

PeerLoss = lightly.loss.NTXentLoss
PeerBank = lightly.models.modules.memory_bank.MemoryBankModule
SIZES = [0, (32, DIM)]


def both(temperature=0.2, size=(32, DIM), **kwargs):
    """Our loss and lightly's with the same random bank."""
    return seeded(NTXentLoss, temperature, size, adaptation="xbm", **kwargs), seeded(PeerLoss, temperature, size)


# ------------------------------------------------------------------------------------- temperature, derivatives, names


@pytest.mark.parametrize("size", SIZES)
def test_a_learnable_temperature_has_lightlys_gradient(size):
    ours, peer = (seeded(make, nn.Parameter(torch.tensor(0.1)), size, **options) for make, options in
                  ((NTXentLoss, {"adaptation": "xbm"}), (PeerLoss, {})))  # fmt: skip
    for _ in range(3):
        given = pair()
        slopes = [torch.autograd.grad(loss(*given), loss.temperature)[0] for loss in (ours, peer)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)
        assert slopes[0].abs() > 1e-3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_a_temperature_that_is_none_is_refused(temperature, size):
    for value in (temperature, torch.tensor(temperature)):
        with pytest.raises(UserError, match="temperature above 0"):
            NTXentLoss(value, size)


def test_arguments_are_checked_without_a_bank_too():
    for make in (lambda **options: NTXentLoss(**options), lambda **options: MemoryBankModule(0, **options)):
        with pytest.raises(UserError, match="'nonsense'"):
            make(adaptation="nonsense")
        with pytest.raises(UserError, match="floating point dtype"):
            make(dtype=torch.int32)


@pytest.mark.parametrize("make", [NTXentLoss, lambda **options: MemoryBankModule(0, **options)])
def test_an_adaptation_without_a_bank_is_warned_of(make):
    for adaptation in ("xbn", "axbn", AXBN(r=2.0)):
        with pytest.warns(UserWarning, match=r"adaptation=.* has no effect without a memory bank"):
            make(adaptation=adaptation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()
        make(adaptation="xbm")


def test_the_adaptation_of_a_bank_is_xbn_by_default():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bank in (NTXentLoss(0.1, (32, DIM)).memory_bank, MemoryBankModule((32, DIM))):
            assert type(bank.queue.adaptation) is XBN
        assert type(NTXentLoss(0.1, (32, DIM), adaptation="axbn").memory_bank.queue.adaptation) is AXBN


def test_second_derivatives_are_refused_or_are_lightlys():
    q, k = pair(dtype=torch.float64)

    def penalty(loss):
        (slope,) = torch.autograd.grad(loss(q, k), q, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), q)[0]

    with pytest.raises(RuntimeError, match="implementation='dense'"):
        penalty(both()[0])
    ours, peer = both(implementation="dense", dtype=torch.float64)
    peer.double().memory_bank.bank = ours.memory_bank.bank.clone()
    torch.testing.assert_close(penalty(ours), penalty(peer), rtol=1e-5, atol=1e-6)


def test_lightlys_names_may_be_replaced_by_ours(monkeypatch):
    monkeypatch.setattr(lightly.loss, "NTXentLoss", NTXentLoss)
    monkeypatch.setattr(lightly.loss.ntx_ent_loss, "NTXentLoss", NTXentLoss)
    monkeypatch.setattr(lightly.loss.ntx_ent_loss, "MemoryBankModule", MemoryBankModule)
    monkeypatch.setattr(lightly.models.modules.memory_bank, "MemoryBankModule", MemoryBankModule)
    assert lightly.loss.NTXentLoss(0.1, (32, DIM))(*pair()).isfinite()
    assert PeerLoss(0.1, (32, DIM))(*pair()).isfinite()


# --------------------------------------------------------------------------------------------- what a program replaces


def half(base):
    class Half(base):
        """A bank that gives every other negative."""

        def forward(self, output, labels=None, update=False):
            output, negatives = super().forward(output, labels, update)
            return output, negatives[:, ::2]

    return Half


def smooth(loss, base):
    loss.cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.3)


def other_class(loss, base):
    loss.memory_bank.__class__ = half(base)


def other_method(loss, base):
    original = loss.memory_bank.forward
    loss.memory_bank.forward = lambda *args, **kwargs: (lambda out, rows: (out, rows[:, 1:]))(
        *original(*args, **kwargs)
    )


def lightlys_bank(loss, base):
    loss.memory_bank = seeded(PeerBank, (16, DIM))


@pytest.mark.parametrize("change", [smooth, other_class, other_method, lightlys_bank])
def test_what_a_program_replaces_is_called_as_lightly_calls_it(change):
    ours, peer = both()
    plain, _ = both()
    for loss, base in ((ours, MemoryBankModule), (peer, PeerBank)):
        change(loss, base)
    for _ in range(4):
        given = pair(key_grad=True)
        values = [loss(*given) for loss in (ours, peer)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
        slopes = [torch.autograd.grad(value, given) for value in values]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)
        assert abs(values[0] - plain(*given)) > 1e-3


# -------------------------------------------------------------------------------------------------- shapes and batches


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", SIZES)
def test_input_that_does_not_fit_is_named_before_anything_moves(size):
    loss = NTXentLoss(0.1, size)
    loss(*pair())
    before = state(loss)
    q, k = pair()
    for given in ((q, k[:5]), (q[0], k[0]), (q, k[0]), (q[None], k[None]), (q, k[:, :3])):
        with pytest.raises(ValueError, match=r"shape \[B, D\]"):
            loss(*given)
        with pytest.raises(ValueError, match=r"shape \[B, D\]"):
            loss.symmetric((q, k), given)
    assert_same_state(before, state(loss))


@pytest.mark.parametrize("size", SIZES)
def test_an_empty_batch_is_zero_with_a_zero_gradient(size):
    loss = NTXentLoss(0.1, size)
    before = state(loss)
    q, k = pair(batch=0, key_grad=True)
    for value in (loss(q, k), loss.symmetric((q, k), (k, q))):
        assert value.item() == 0
        assert all(slope.shape == (0, DIM) for slope in torch.autograd.grad(value, (q, k)))
    bank = MemoryBankModule((8, DIM))
    rows = state(bank)
    assert bank(torch.zeros(0, DIM), update=True)[1].shape == (DIM, 8)
    assert_same_state(rows, state(bank))
    assert_same_state(before, state(loss))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_loss_refuses_the_recomputation_of_a_checkpoint(reentrant):
    loss, (q, k) = NTXentLoss(0.1, (32, DIM)), pair()
    value = torch.utils.checkpoint.checkpoint(loss, q, k, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint computes again"):
        value.backward()
    assert loss.memory_bank.bank_ptr.item() == 8


# --------------------------------------------------------------------------------------------------------------- state


def test_bank_and_pointer_can_be_assigned_as_lightlys():
    ours, peer = both()
    for loss in (ours, peer):
        loss.memory_bank.bank = F.normalize(seeded(torch.randn, 32, DIM), dim=1)
        loss.memory_bank.bank_ptr = torch.tensor([24])
    for _ in range(6):
        given = pair()
        torch.testing.assert_close(ours(*given), peer(*given), rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.memory_bank.bank_ptr.clone(), peer.memory_bank.bank_ptr)
    for loss in (ours, peer):
        loss.memory_bank.bank[:4] = 0.5  # the rows themselves, with "xbm"
    given = pair()
    torch.testing.assert_close(ours(*given), ours_with_unit_rows(peer, given), rtol=1e-5, atol=1e-6)
    adapted = NTXentLoss(0.1, (32, DIM)).memory_bank
    for change in (
        lambda: adapted.bank.zero_(),
        lambda: adapted.bank_ptr.fill_(3),
        lambda: adapted.bank.__setitem__(0, 1),
    ):
        with pytest.raises(RuntimeError, match="assignment of the whole tensor"):
            change()
    for bank, slot in ((adapted, 32), (MemoryBankModule(0), 0)):
        with pytest.raises(ValueError, match="slot"):
            bank.bank_ptr = slot
    with pytest.raises(ValueError, match="shape"):
        adapted.bank = torch.zeros(31, DIM)


def ours_with_unit_rows(peer, given):
    peer.memory_bank.bank = F.normalize(peer.memory_bank.bank, dim=1)
    return peer(*given)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_checkpoint_with_a_bank_of_lightly_is_taken_over(transposed):
    ours, peer = both()
    for _ in range(2):
        peer(*pair())
    bank = peer.memory_bank.bank.T if transposed else peer.memory_bank.bank
    ours.load_state_dict({"memory_bank.bank": bank, "memory_bank.bank_ptr": peer.memory_bank.bank_ptr})
    for _ in range(4):
        given = pair()
        torch.testing.assert_close(ours(*given), peer(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_negatives_have_the_dtype_of_the_output(dtype):
    for bank in (
        MemoryBankModule((8, 3)).to(dtype),
        MemoryBankModule((8, 3), normalize=True),
        NNMemoryBankModule((8, 3)),
    ):
        output = torch.randn(4, 3, dtype=dtype)
        result = bank(output, update=True)
        negatives = result if isinstance(result, torch.Tensor) else result[1].T
        assert negatives.dtype == dtype
        assert (output @ negatives.T).isfinite().all()


def test_a_bank_is_built_on_the_meta_device():
    saved = seeded(NTXentLoss, 0.1, (32, DIM))
    with torch.device("meta"):
        loss, bank = NTXentLoss(0.1, (32, DIM)), MemoryBankModule((32, DIM))
    assert loss.memory_bank.queue.rows.is_meta
    assert bank.bank.is_meta
    loss.to_empty(device="cpu").load_state_dict(saved.state_dict())
    given = pair()
    assert torch.equal(loss(*given), saved(*given))


# ------------------------------------------------------------------------------------- lightly's other losses and banks


def test_nearest_rows_with_xbm_are_lightlys():
    ours, peer = seeded(NNMemoryBankModule, (12, 3), adaptation="xbm"), seeded(PeerNearest, (12, 3))
    for step in range(9):
        batch = torch.randn(4, 3, requires_grad=True)
        rows = [bank(batch, update=step % 3 != 1) for bank in (ours, peer)]
        torch.testing.assert_close(*rows)
        assert not rows[0].requires_grad
    with pytest.raises(ValueError, match="at least 1 row"):
        NNMemoryBankModule(0)(batch)


def test_nearest_rows_with_xbn_are_of_the_adapted_bank():
    nearest, bank = (seeded(make, (40, 3)) for make in (NNMemoryBankModule, MemoryBankModule))
    for _ in range(4):
        batch = torch.randn(6, 3) * 2 + 1
        rows = nearest(batch, update=True)
        adapted = bank(batch, update=True)[1].T
        cosine = F.normalize(batch, dim=1) @ F.normalize(adapted, dim=1).T
        torch.testing.assert_close(rows, adapted[cosine.argmax(1)])
    p = torch.randn(6, 3, requires_grad=True)
    PeerLoss(0.1)(rows, p).backward()  # NNCLR
    assert p.grad.any()


def test_other_losses_of_lightly_run_on_our_bank():
    size = (32, 4)
    for make, dim in ((lambda: DirectCLRLoss(4, 0.2, size), DIM), (lambda: CO2Regularizer(1.0, 0.1, size), 4)):
        ours, peer, adapted = seeded(make), seeded(make), seeded(make)
        ours.memory_bank = seeded(MemoryBankModule, size, adaptation="xbm", normalize=True)
        adapted.memory_bank = seeded(MemoryBankModule, size, normalize=True)
        for _ in range(6):
            given = pair(dim=dim)
            torch.testing.assert_close(ours(*given), peer(*given), rtol=1e-5, atol=1e-6)
            assert adapted(*given).isfinite()
        keys = F.normalize(given[1][:, :4], dim=1)
        rows = adapted.memory_bank(keys)[1]
        torch.testing.assert_close(rows.norm(dim=0), torch.ones(32))
        moments = adapted.memory_bank.queue.moments()
        assert (moments.mean - keys.mean(0)).norm() < 0.5 * (
            ours.memory_bank.queue.moments().mean - keys.mean(0)
        ).norm()
