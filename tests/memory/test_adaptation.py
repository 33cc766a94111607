"""The Kalman filter against a literal NumPy one, and what the names mean."""

import numpy as np
import pytest
import torch
from reference import ReferenceQueue

from selfsup_xbn.config.registry import ADAPTATIONS, Entry
from selfsup_xbn.errors import UserError
from selfsup_xbn.memory import AXBN, XBM, XBN, Adaptation, FeatureQueue, Moments, batch_moments
from selfsup_xbn.memory.adaptation import make_adaptation

TRUE = torch.tensor(True)
FILTERS = [(1.0, 0.01, 1.0, 100), (1.0, 0.01, 1.0, 10), (0.02, 5.0, 3.0, 1), (0.0, 2.0, 1.0, 3)]


def filtered(adaptation, batches):
    """Estimates of the adaptation after each batch."""
    adaptation.allocate(batches[0].shape[1])
    estimates = []
    for batch in batches:
        target = adaptation(batch_moments(torch.tensor(batch)), len(batch), TRUE)
        estimates.append(torch.stack(target).clone().numpy())
    return np.stack(estimates)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize(("q", "r", "p0", "interval"), FILTERS)
def test_equals_a_literal_numpy_filter(q, r, p0, interval, literal):
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(int(rng.integers(2, 30)), 4)) for _ in range(250)]
    reference = ReferenceQueue(1, "axbn", q, r, p0, interval, literal)
    expected = np.stack([reference.target(batch) for batch in batches])
    adaptation = AXBN(q, r, p0, interval, literal=literal)
    np.testing.assert_allclose(filtered(adaptation, batches), expected, rtol=1e-10)
    assert adaptation.gain.item() == pytest.approx(reference.gain, rel=1e-12)


@pytest.mark.parametrize(("batch_size", "gain"), [(64, 0.99984), (16, 0.9994)])
def test_the_papers_constants_give_a_gain_of_nearly_one(batch_size, gain):
    adaptation, rng = AXBN(), np.random.default_rng(0)
    filtered(adaptation, [rng.normal(size=(batch_size, 2)) for _ in range(500)])
    assert round(adaptation.gain.item(), 5 if gain == 0.99984 else 4) == gain


def test_a_filter_that_trusts_nothing_new_averages():
    adaptation, rng = AXBN(q=0.0, r=1.0, p0=1.0, gain_interval=1), np.random.default_rng(0)
    batches = [rng.normal(size=(8, 3)) for _ in range(200)]
    # q = 0: the estimate is the mean of the observations, the first of which weighs r / B times p0's worth.
    weights = np.array([8.0] + [8.0] * 199)
    weights[0] = 1.0  # P_0 = 1 is the variance of one sample's observation
    moments = np.stack([[b.mean(0), b.std(0, ddof=1)] for b in batches])
    expected = (moments * weights[:, None, None]).sum(0) / weights.sum()
    np.testing.assert_allclose(filtered(adaptation, batches)[-1], expected, rtol=1e-10)


def test_a_batch_that_is_not_finite_is_passed_over():
    a, b = AXBN(r=1.0, gain_interval=2), AXBN(r=1.0, gain_interval=2)
    for adaptation in (a, b):
        adaptation.allocate(3)
    for step in range(9):
        moments = batch_moments(torch.randn(5, 3))
        a(moments, 5, TRUE)
        b(moments, 5, TRUE)
        if step % 2:
            nothing = torch.full((3,), torch.nan, dtype=torch.float64)
            b(Moments(nothing, nothing), 5, torch.tensor(False))
    for (name, expected), value in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def test_moments_are_unbiased_and_float64_whatever_the_batch():
    batch = torch.randn(50, 3) + 100
    for rows in (batch, batch.half(), batch.bfloat16()):
        mean, std = batch_moments(rows)
        np.testing.assert_allclose(mean, rows.double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(std, rows.double().numpy().std(0, ddof=1), rtol=1e-9)


def test_reset_returns_to_the_start_in_place():
    adaptation, rng = AXBN(r=1.0, gain_interval=2), np.random.default_rng(0)
    batches = [rng.normal(size=(5, 3)) for _ in range(6)]
    first = filtered(adaptation, batches)
    buffers = [buffer.data_ptr() for buffer in adaptation.buffers()]
    adaptation.reset()
    assert [buffer.data_ptr() for buffer in adaptation.buffers()] == buffers
    again = [torch.stack(adaptation(batch_moments(torch.tensor(b)), 5, TRUE)).clone().numpy() for b in batches]
    np.testing.assert_array_equal(np.stack(again), first)


def test_a_further_adaptation_is_a_class_and_a_line(monkeypatch):
    class ToStandard(Adaptation):
        def forward(self, observed, batch_size, finite):
            return Moments(torch.zeros_like(observed.mean), torch.ones_like(observed.std))

    monkeypatch.setitem(ADAPTATIONS.entries, "standard", Entry(ToStandard, "standard moments"))
    queue = FeatureQueue(20, 3, "standard")
    queue.enqueue(torch.randn(20, 3) * 5 + 2)
    queue.adapt(torch.randn(4, 3))
    rows = queue.features()
    torch.testing.assert_close(rows.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows.std(0), torch.ones(3), rtol=1e-6, atol=0)


def test_names_and_instances():
    assert [type(make_adaptation(name)) for name in ("xbm", "xbn", "axbn")] == [XBM, XBN, AXBN]
    own = AXBN(r=3.0)
    assert make_adaptation(own).r == 3.0
    with pytest.raises(
        UserError, match=r"unknown adaptation 'axbm': expected one of xbm, xbn, axbn; did you mean (axbn|xbm)"
    ):
        make_adaptation("axbm")


@pytest.mark.parametrize(
    "kwargs",
    [
        *({"q": -1.0}, {"r": -1.0}, {"q": 0.0, "r": 0.0}, {"q": 0.0, "p0": 0.0}, {"gain_interval": 0}),
        *({"r": np.nan}, {"q": "1"}, {"p0": None}, {"p0": np.inf}, {"gain_interval": 1.5}),
    ],
)
def test_constants_that_make_no_filter_are_refused(kwargs, unchecked):
    with pytest.raises(UserError, match="expected"):
        AXBN(**kwargs)
