"""A queue step on the host's side: resumed, compiled, on a fake accelerator, and without any wait or new buffer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory.queue_helpers import ADAPTATIONS, filled, saved_and_loaded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import selfsup_xbn
from selfsup_xbn import FeatureQueue


def steps(count, rows=6, dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, dim, generator=generator) * 2 + torch.randn(count, 1, dim, generator=generator)


def step(queue, batch):
    queue.adapt(batch)
    return queue.enqueue(batch, torch.arange(len(batch)) if queue.labels is not None else None)


def assert_same_state(a, b):
    for (name, value), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("stop", [1, 4, 7, 15])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(adaptation, stop):
    whole, first = FeatureQueue(32, 3, adaptation), FeatureQueue(32, 3, adaptation)
    batches = steps(40)
    batches[2, 0, 0] = torch.nan  # the rows offered are then more than the rows written
    for batch in batches:
        step(whole, batch)
    for batch in batches[:stop]:
        step(first, batch)
    rest = saved_and_loaded(first)
    for batch in batches[stop:]:
        step(rest, batch)
    assert_same_state(rest, whole)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_refresh_is_called_once_per_pass(adaptation, monkeypatch):
    queue, refreshed = FeatureQueue(32, 3, adaptation), []
    refresh = FeatureQueue.refresh
    monkeypatch.setattr(FeatureQueue, "refresh", lambda self: (refreshed.append(int(self.written)), refresh(self)))
    for batch in steps(4, rows=8):
        step(queue, batch)
    assert refreshed == []
    for batch in steps(9, rows=8):
        step(queue, batch)
    assert refreshed == [32, 64, 96]
    assert int(queue.offered) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 20, 40])
def test_refresh_changes_no_embedding_and_no_moment(rows, dtype):
    queue = filled(rows=rows, dtype=dtype)
    queue.adapt(torch.randn(10, 6) * 5 - 3)
    features, moments = queue.features(), queue.moments()
    queue.refresh()
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(queue.features(), features, rtol=tolerance, atol=5 * tolerance)
    torch.testing.assert_close(queue.moments().mean, moments.mean, rtol=tolerance, atol=5 * tolerance)
    torch.testing.assert_close(queue.moments().std, moments.std, rtol=tolerance, atol=5 * tolerance)
    if rows > 1:
        stored = queue.rows[:rows].double()
        torch.testing.assert_close(stored.std(0), torch.ones_like(moments.std), rtol=1e-2, atol=0)
        assert (queue.rows[len(queue) :] == 0).all()


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_no_step_or_reset_replaces_a_buffer(adaptation):
    queue = FeatureQueue(32, 3, adaptation, labels=True)
    addresses = {name: buffer.data_ptr() for name, buffer in queue.named_buffers()}
    for batch in steps(20):
        step(queue, batch)
    queue.load_state_dict(saved_and_loaded(queue).state_dict())
    queue.reset()
    assert {name: buffer.data_ptr() for name, buffer in queue.named_buffers()} == addresses
    assert_same_state(queue, FeatureQueue(32, 3, adaptation, labels=True))


class NoWaiting(TorchDispatchMode):
    """Refuses to read a value, and shapes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_no_step_and_no_refresh_reads_a_value(adaptation):
    queue = FeatureQueue(32, 3, adaptation, labels=True)
    with NoWaiting():
        for batch in steps(20):
            step(queue, batch)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            len(queue)


@pytest.fixture(scope="module")
def compiled():
    """What ``compiled_program`` finds. In a process without the annotations' checks, which cannot be compiled."""
    env = os.environ | {"PYTHONPATH": str(Path(selfsup_xbn.__file__).parents[1])}
    program = Path(__file__).with_name("compiled_program.py")
    return json.loads(subprocess.run([sys.executable, program], env=env, check=True, timeout=200, stdout=-1).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_compiled_steps_equal_eager_ones_and_compile_once(adaptation, compiled):
    assert compiled[adaptation]["recompilations"] == 0
    assert compiled[adaptation]["same"]
    assert compiled[adaptation]["difference"] < 1e-5


@pytest.mark.slow
def test_moments_hold_for_20000_steps_without_a_refresh(unchecked, monkeypatch):
    monkeypatch.setattr("selfsup_xbn.memory.feature_queue.can_refresh", lambda tensor: False)
    queue = FeatureQueue(4096, 2)
    for batch in steps(20_000, rows=16, dim=2):
        step(queue, batch)
    rows, moments = queue.features().double(), queue.moments()
    assert queue.scale.min() > 2  # the map was never standardized
    assert ((moments.mean - rows.mean(0)) / rows.std(0)).abs().max() < 1e-6
    torch.testing.assert_close(moments.std, rows.std(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("rows", [5, 40])
def test_a_step_runs_on_a_fake_accelerator(adaptation, rows):
    with FakeTensorMode(allow_non_fake_inputs=False):
        queue = FeatureQueue(32, 3, adaptation, labels=True, device="cuda")
        batch = torch.empty(rows, 3, device="cuda")
        queue.adapt(batch)
        slots = queue.enqueue(batch, torch.empty(rows, dtype=torch.int64, device="cuda"))
        blocks = list(queue.blocks(10))
        nearest = queue.nearest(batch)
        queue.refresh()
        moments = queue.moments()
    assert [tuple(block.rows.shape) for block in blocks] == [(10, 3)] * 3 + [(2, 3)]
    assert all(block.valid.dtype == torch.bool for block in blocks)
    assert {tensor.device.type for tensor in (slots, nearest, *moments, *queue.buffers())} == {"cuda"}
    assert (slots.shape, nearest.shape) == ((rows,), (rows, 3))


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_a_queue_is_built_on_the_meta_device(adaptation):
    with torch.device("meta"):
        queue = FeatureQueue(10, 3, adaptation, labels=True)
    assert all(buffer.is_meta for buffer in queue.buffers())
    real = queue.to_empty(device="cpu")
    real.reset()
    batch = torch.randn(4, 3)
    step(real, batch)
    torch.testing.assert_close(real.features(), batch)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_a_device_without_float64_gets_float32_statistics(adaptation, monkeypatch):
    queue = FeatureQueue(10, 3, adaptation)
    monkeypatch.setattr("selfsup_xbn.memory.device.statistics_dtype", lambda device: torch.float32)
    queue.to("cpu")
    assert torch.float64 not in {buffer.dtype for buffer in queue.buffers()}
    batch = torch.randn(4, 3)
    step(queue, batch)
    torch.testing.assert_close(queue.features(), batch)
