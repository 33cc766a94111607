"""The queue against the literal float64 reference and against a deque, and the properties of moment matching."""

import copy
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory.queue_helpers import ADAPTATIONS, MOVING, filled, in_order, random_batch, saved_and_loaded
from reference import ReferenceQueue

from selfsup_xbn import AXBN, XBN, FeatureQueue
from selfsup_xbn.errors import UserError
from selfsup_xbn.memory.sharding import ShardedQueue


@pytest.mark.parametrize(
    ("adaptation", "statistics", "steps"),
    [
        ("xbn", torch.float64, 400),
        *(
            pytest.param(adaptation, statistics, 2000, marks=pytest.mark.slow)
            for adaptation in ADAPTATIONS
            for statistics in (torch.float64, torch.float32)
        ),
    ],
)
def test_equals_the_literal_equations_over_many_steps(adaptation, statistics, steps, unchecked, monkeypatch):
    monkeypatch.setattr("selfsup_xbn.memory.feature_queue.statistics_dtype", lambda device: statistics)
    size, dim, rng = 37, 5, np.random.default_rng(0)
    queue, reference = FeatureQueue(size, dim, adaptation, labels=True), ReferenceQueue(size, adaptation)
    for step in range(steps):
        rows = int(rng.integers(1, size + 1)) if step % 3 else int(rng.integers(1, 6))
        batch, labels = random_batch(rng, rows, dim), rng.integers(0, 9, rows)
        queue.adapt(torch.tensor(batch))
        queue.enqueue(torch.tensor(batch), torch.tensor(labels))
        reference.adapt(batch)
        reference.enqueue(batch, labels.tolist())
        if step % 97 == 0:
            queue = saved_and_loaded(queue)
        expected = np.stack(reference.rows)
        rows, labels = in_order(queue)
        assert rows.shape == expected.shape
        assert labels == list(reference.labels)
        assert np.abs(rows - expected).max() <= 1e-4 * np.abs(expected).max()
    assert queue.sums.dtype == statistics


@pytest.mark.slow
@pytest.mark.parametrize("adaptation", MOVING)
def test_does_not_drift_over_100000_steps(adaptation, unchecked):
    size, dim, steps, rng = 16, 2, 100_000, np.random.default_rng(0)
    queue, reference = FeatureQueue(size, dim, adaptation), ReferenceQueue(size, adaptation)
    # Drawn at once: the loop is long.
    batches = (rng.normal(size=(steps, 5, dim)) * np.exp(rng.normal(size=(steps, 1, dim)) / 2)).astype(np.float32)
    for batch, tensor in zip(batches, torch.tensor(batches), strict=True):
        queue.adapt(tensor)
        queue.enqueue(tensor)
        reference.adapt(batch)
        reference.enqueue(batch)
    expected = np.stack(reference.rows)
    assert np.abs(in_order(queue)[0] - expected).max() <= 1e-3 * np.abs(expected).max()
    tracked = queue.moments()
    torch.testing.assert_close(tracked.mean, torch.tensor(expected.mean(0)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tracked.std, torch.tensor(expected.std(0, ddof=1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_rounding_of_a_huge_row_is_gone_after_the_next_pass(adaptation):
    size, rng = 24, np.random.default_rng(0)
    queue = FeatureQueue(size, 3, adaptation)
    for step in range(3 * size // 6 + 1):
        batch = torch.tensor(random_batch(rng, 6, 3))
        if step == 1:
            batch[2] = 1e15  # its square takes all of float64's digits from the others'
        queue.adapt(batch)
        queue.enqueue(batch)
    rows = queue.features().double()
    torch.testing.assert_close(queue.moments().mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(queue.moments().std, rows.std(0), rtol=1e-5, atol=1e-6)


class QueueAgainstDeque(RuleBasedStateMachine):
    """Contents, labels, slots, counts and tracked moments under any sequence of operations."""

    @initialize(size=st.integers(1, 9), seed=st.integers(0, 999), adaptation=st.sampled_from(ADAPTATIONS))
    def start(self, size, seed, adaptation):
        self.queue, self.reference = FeatureQueue(size, 3, adaptation, labels=True), ReferenceQueue(size, adaptation)
        self.rng, self.next_label, self.skipped = np.random.default_rng(seed), 0, 0
        self.deque = deque(maxlen=size)

    @rule(rows=st.integers(1, 13))
    def adapt(self, rows):
        batch = random_batch(self.rng, rows, 3)
        self.queue.adapt(torch.tensor(batch))
        self.reference.adapt(batch)

    @rule(rows=st.integers(1, 13))
    def enqueue(self, rows):
        batch = random_batch(self.rng, rows, 3)
        labels = list(range(self.next_label, self.next_label + rows))
        self.next_label += rows
        slots = self.queue.enqueue(torch.tensor(batch), torch.tensor(labels))
        self.reference.enqueue(batch, labels)
        self.deque.extend(labels)
        kept = slots >= 0
        assert kept.tolist() == [False] * (rows - int(kept.sum())) + [True] * int(kept.sum())
        assert self.queue.labels[slots[kept]].tolist() == labels[-int(kept.sum()) :]

    @rule(rows=st.integers(1, 5), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
    def non_finite_batch(self, rows, bad):
        batch = random_batch(self.rng, rows, 3)
        batch[self.rng.integers(rows), self.rng.integers(3)] = bad
        self.queue.adapt(torch.tensor(batch))
        slots = self.queue.enqueue(torch.tensor(batch), torch.arange(rows))
        self.skipped += 1
        assert (slots == -1).all()

    @rule()
    def save_and_load(self):
        self.queue = saved_and_loaded(self.queue)

    @rule()
    def reset(self):
        self.queue.reset()
        self.reference = ReferenceQueue(self.queue.size, self.reference.adaptation)
        self.deque.clear()
        self.skipped = 0

    @precondition(lambda self: hasattr(self, "queue"))
    @invariant()
    def same(self):
        rows, labels = in_order(self.queue)
        assert labels == list(self.deque)
        assert int(self.queue.skipped) == self.skipped
        assert len(rows) == len(self.queue) == len(self.deque)
        if len(rows):
            expected = np.stack(self.reference.rows)
            np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4 * (1 + np.abs(expected).max()))
        if len(rows) > 1:
            np.testing.assert_allclose(self.queue.moments().std, expected.std(0, ddof=1), rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(
                self.queue.moments().mean, expected.mean(0), rtol=1e-4, atol=1e-5 * (1 + np.abs(expected).max())
            )


QueueAgainstDeque.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestQueueAgainstDeque = pytest.mark.usefixtures("unchecked")(QueueAgainstDeque.TestCase)


@pytest.mark.parametrize("adaptation", MOVING)
def test_adapted_moments_equal_the_target(adaptation):
    queue = filled(adaptation)
    batch = torch.randn(10, 6) * 3 + 2
    queue.adapt(batch)
    target = batch.double() if adaptation == "xbn" else None
    mean, std = (target.mean(0), target.std(0)) if target is not None else (queue.adaptation.mean, queue.adaptation.std)
    rows = queue.features().double()
    torch.testing.assert_close(rows.mean(0), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.std(0), std, rtol=1e-5, atol=1e-5)


def test_adapting_twice_is_adapting_once():
    queue, batch = filled(), torch.randn(10, 6)
    queue.adapt(batch)
    once = queue.features()
    queue.adapt(batch)
    torch.testing.assert_close(queue.features(), once, rtol=1e-6, atol=1e-6)


def test_a_positive_affine_change_of_the_queue_changes_nothing():
    rows, batch = torch.randn(40, 6), torch.randn(10, 6) * 2 + 1
    adapted = []
    for values in (rows, rows * torch.rand(6).add(0.5) + torch.randn(6)):
        queue = FeatureQueue(40, 6)
        queue.enqueue(values)
        queue.adapt(batch)
        adapted.append(queue.features())
    torch.testing.assert_close(*adapted, rtol=1e-5, atol=1e-5)


def test_xbm_leaves_the_rows_alone_to_the_last_bit():
    queue, batches = FeatureQueue(8, 3, "xbm"), torch.randn(5, 4, 3)
    for batch in batches:
        queue.adapt(batch)
        queue.enqueue(batch)
    assert torch.equal(torch.tensor(in_order(queue)[0]).float(), batches[-2:].flatten(0, 1))


@pytest.mark.parametrize("constant_in", ["queue", "batch", "both"])
def test_a_constant_dimension_is_shifted_not_scaled(constant_in):
    rows, batch = torch.randn(20, 3), torch.randn(6, 3) * 2 + 5
    if constant_in != "batch":
        rows[:, 1] = 0.3
    if constant_in != "queue":
        batch[:, 1] = 0.7
    queue = FeatureQueue(20, 3)
    queue.enqueue(rows)
    for _ in range(50):
        queue.adapt(batch)
        queue.enqueue(batch)
    assert queue.features().isfinite().all()
    queue.reset()
    queue.enqueue(rows)
    queue.adapt(batch)
    expected = rows[:, 1] - rows[:, 1].mean() + batch[:, 1].mean()
    torch.testing.assert_close(queue.features()[:, 1], expected, rtol=1e-5, atol=1e-5)
    other = torch.randn(6, 3)
    queue.enqueue(batch)
    queue.adapt(other)
    assert queue.features().isfinite().all()
    torch.testing.assert_close(queue.features()[:, 0].std(), other[:, 0].std(), rtol=1e-4, atol=1e-5)


def test_a_dimension_that_collapses_again_and_again_stays_finite(unchecked):
    queue, reference = FeatureQueue(64, 4), ReferenceQueue(64)
    rng = np.random.default_rng(0)
    for step in range(400):
        batch = np.maximum(random_batch(rng, 2 + step % 3, 4, moving=False), 0)  # ReLU: often all zero in a dimension
        queue.adapt(torch.tensor(batch))
        queue.enqueue(torch.tensor(batch))
        reference.adapt(batch)
        reference.enqueue(batch)
        expected = np.stack(reference.rows)
        assert np.abs(in_order(queue)[0] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_batch_of_one_adapts_nothing_and_is_enqueued():
    queue = filled()
    before = queue.features()
    row = torch.randn(1, 6)
    queue.adapt(row)
    assert torch.equal(queue.features(), before)
    slots = queue.enqueue(row)
    torch.testing.assert_close(queue.features()[slots], row)


def test_the_first_batch_is_enqueued_as_it_is():
    queue, batch = FeatureQueue(10, 3, "axbn"), torch.randn(4, 3)
    queue.adapt(batch)
    queue.enqueue(batch)
    torch.testing.assert_close(queue.features(), batch, rtol=1e-6, atol=1e-7)
    assert torch.equal(queue.adaptation.mean, batch.double().mean(0))


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_batch_changes_nothing_but_the_count(adaptation, bad):
    queue = filled(adaptation)
    queue.refresh()  # which is due
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    batch = torch.randn(7, 6)
    batch[3, 2] = bad
    queue.adapt(batch)
    assert (queue.enqueue(batch) == -1).all()
    for name, value in queue.state_dict().items():
        assert torch.equal(value, before[name] + {"skipped": 1, "offered": 7}.get(name, 0)), name


def test_values_too_large_for_the_storage_are_kept_out():
    queue = FeatureQueue(8, 2, "xbm", dtype=torch.float16)
    queue.enqueue(torch.full((2, 2), 1e6))
    assert len(queue) == 0
    assert int(queue.skipped) == 1


@pytest.mark.parametrize("scale", [1e-8, 1e5])
def test_float16_storage_takes_values_outside_of_float16s_range(scale):
    queue, batch = FeatureQueue(8, 2, dtype=torch.float16), torch.randn(8, 2) * scale
    queue.adapt(batch)
    queue.enqueue(batch)
    torch.testing.assert_close(queue.features() / scale, batch / scale, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_a_record_is_kept_on_request(adaptation):
    queue, batch = filled(adaptation), torch.randn(9, 6) + 3
    queue.adapt(batch)
    assert queue.record is None
    before = queue.features().double()
    batch = torch.randn(9, 6)
    queue.recording = True
    queue.adapt(batch)
    after = queue.features().double()
    for moments, rows in zip(queue.record, (batch.double(), before, after), strict=True):
        torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.std, rows.std(0), rtol=1e-5, atol=1e-5)
    record, queue.recording = queue.record, False
    queue.adapt(batch + 1)
    assert queue.record is record


def test_a_batch_larger_than_the_queue_keeps_its_last_rows():
    queue, batch = FeatureQueue(5, 2, labels=True), torch.randn(12, 2)
    slots = queue.enqueue(batch, torch.arange(12))
    assert slots.tolist() == [-1] * 7 + [0, 1, 2, 3, 4]
    assert torch.equal(queue.features(), batch[-5:])
    assert queue.labels.tolist() == [7, 8, 9, 10, 11]


def test_no_gradient_reaches_the_queue():
    batch = torch.randn(4, 6, requires_grad=True)
    queue = filled()
    queue.adapt(batch)
    queue.enqueue(batch)
    assert not any(buffer.requires_grad for buffer in queue.buffers())
    tensors = [queue.features(), queue.nearest(batch), *queue.affine_map(), *queue.moments()]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("rows", [5, 40, 60])
def test_blocks_map_to_the_features(rows, monkeypatch):
    queue = filled(rows=rows)
    expected, affine_map = queue.features(), queue.affine_map()
    blocks = list(queue.blocks(7))
    assert torch.equal(torch.cat([affine_map(block.rows) for block in blocks]), expected)
    for block in blocks:
        assert block.valid is None
        assert block.labels is None
        assert block.rows.data_ptr() == queue.rows[block.slots].data_ptr()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on an accelerator: fixed shapes
    blocks = list(queue.blocks(7))
    assert sum(len(block.rows) for block in blocks) == 40
    valid = torch.cat([block.valid for block in blocks])
    assert torch.equal(torch.cat([affine_map(block.rows) for block in blocks])[valid], expected)


def test_blocks_and_gather_carry_labels():
    queue = FeatureQueue(10, 2, labels=True)
    queue.enqueue(torch.randn(6, 2), torch.arange(10, 16))
    assert [block.labels.tolist() for block in queue.blocks(4)] == [[10, 11, 12, 13], [14, 15]]
    indices = torch.tensor([4, 0, 4])
    block = queue.gather(indices)
    assert block.labels.tolist() == [14, 10, 14]
    assert torch.equal(block.rows, queue.rows[indices])
    assert block.slots is indices


@pytest.mark.parametrize("rows", [0, 5, 60])
@pytest.mark.parametrize("compiling", [False, True])
def test_nearest_is_the_row_of_largest_cosine(rows, compiling, monkeypatch):
    queue, queries = filled(rows=rows), torch.randn(9, 6)
    features = queue.features()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr("selfsup_xbn.memory.feature_queue.PIECE", 63)  # blocks of 7 rows
    expected = queries
    if rows:
        cosine = F.normalize(queries.double(), dim=1) @ F.normalize(features.double(), dim=1).T
        expected = features[cosine.argmax(1)]
    torch.testing.assert_close(queue.nearest(queries), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_bfloat16_storage_keeps_three_digits_of_the_deviations(steps):
    stored, exact = (FeatureQueue(64, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    for _ in range(steps):
        batch = torch.randn(16, 8) * 0.01 + 1  # of no use in bfloat16 as it is: its steps near 1 are 0.008
        for queue in (stored, exact):
            queue.adapt(batch)
            queue.enqueue(batch)
    assert stored.rows.dtype == torch.bfloat16
    assert (stored.features() - exact.features()).abs().max() < 0.01 * exact.features().std() * 3
    rows = stored.features().double()
    torch.testing.assert_close(stored.moments().mean, rows.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stored.moments().std, rows.std(0), rtol=1e-4, atol=1e-6)


def test_module_casts_and_autocast_leave_the_statistics_alone():
    queue, twin = filled(), filled()
    model = torch.nn.Sequential(queue).half().bfloat16()
    batch = torch.randn(10, 6)
    with torch.autocast("cpu", torch.bfloat16):
        model[0].adapt(batch)
        model[0].enqueue(batch)
    twin.adapt(batch)
    twin.enqueue(batch)
    assert queue.sums.dtype == queue.scale.dtype == queue.shift.dtype == torch.float64
    assert queue.rows.dtype == torch.float32
    assert torch.equal(queue.features(), twin.features())


def test_half_precision_batches_are_taken():
    queue = FeatureQueue(8, 4)
    batch = torch.randn(4, 4)
    for dtype in (torch.float16, torch.bfloat16):
        queue.adapt(batch.to(dtype))
        queue.enqueue(batch.to(dtype))
    torch.testing.assert_close(queue.features()[4:], batch.bfloat16().float())


def test_state_is_independent_of_the_original_and_complete():
    queue = filled("axbn")
    copied, loaded = copy.deepcopy(queue), saved_and_loaded(queue)
    batch = torch.randn(9, 6)
    for memory in (queue, copied, loaded):
        memory.adapt(batch)
        memory.enqueue(batch)
    for name, value in queue.state_dict().items():
        assert torch.equal(value, copied.state_dict()[name]), name
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_an_adaptation_given_to_two_queues_is_not_shared():
    adaptation = AXBN(r=0.5)
    a, b = FeatureQueue(8, 2, adaptation), FeatureQueue(8, 2, adaptation)
    a.adapt(torch.randn(4, 2))
    assert int(a.adaptation.step) == 1
    assert int(b.adaptation.step) == 0
    assert not list(adaptation.buffers())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureQueue(0, 3), "size=0"),
        (lambda: FeatureQueue(3, 0), "dim=0"),
        (lambda: FeatureQueue(3, 3, "xbm2"), "did you mean xbm"),
        (lambda: FeatureQueue(3, 3, dtype=torch.int64), "int64"),
        (lambda: FeatureQueue(3, 3, dtype=int), "floating point dtype .* got <class 'int'>"),
        (lambda: FeatureQueue(64.0, 8), "expected a whole number as size, got 64.0"),
        (lambda: FeatureQueue("64", 8), "expected a whole number as size, got '64'"),
        (lambda: FeatureQueue(64, None), "expected a whole number as dim, got None"),
        (lambda: ShardedQueue(64.0, 8), "expected a whole number as size, got 64.0"),
        (lambda: FeatureQueue(64, 8, None), "expected an adaptation: xbm, xbn, axbn, or an instance .* got None"),
        (lambda: FeatureQueue(64, 8, XBN), "or an instance such as .* got <class"),
    ],
)
def test_bad_settings_are_named(make, message, unchecked):
    with pytest.raises(UserError, match=message):
        make()


def test_sizes_may_be_integers_of_numpy(unchecked):
    queue = FeatureQueue(np.int64(5), np.int32(3))
    assert [type(number) for number in (queue.size, queue.dim)] == [int, int]
    assert queue.rows.shape == (5, 3)


@pytest.mark.parametrize(
    ("batch", "labels", "message"),
    [
        (torch.zeros(4, 5), None, r"\[B, 6\], got \[4, 5\]"),
        (torch.zeros(0, 6), None, r"got \[0, 6\]"),
        (torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64), "labels=True"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, labels, message):
    with pytest.raises(ValueError, match=message):
        filled(XBN()).enqueue(batch, labels)


def test_labels_are_required_where_they_are_kept():
    with pytest.raises(ValueError, match="label"):
        FeatureQueue(4, 2, labels=True).enqueue(torch.zeros(2, 2))
