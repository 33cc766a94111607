"""Adapt and enqueue as Triton kernels against PyTorch's operations: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from selfsup_xbn import FeatureQueue
from selfsup_xbn.memory import AXBN
from selfsup_xbn.memory.device import queue_kernels

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
M, D = 50, 9
SIZES = (7, 16, 1, 60, 13)  # a single row, and more rows than the queue has
ADAPTATIONS = {
    "xbm": "xbm",
    "xbn": "xbn",
    "axbn": AXBN(r=1.0, gain_interval=3),
    "literal": AXBN(r=1.0, gain_interval=2, literal=True),
}


def batches(dtype, count=14):
    """Yield batches with a constant dimension, and some with a value that is not finite."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        batch = torch.randn(SIZES[i % 5], D, generator=generator) * (1 + 0.1 * i) + 0.3 * i
        batch[:, 3] = 5.0
        if i % 9 == 4:
            batch[0, 7] = torch.nan
        if i % 9 == 6:
            batch[-1, 2] = torch.inf
        if i % 11 == 7 and dtype == torch.float16:
            batch[-1, 2] = 1e6  # finite, and not in float16
        yield batch.to(DEVICE), torch.randint(0, 9, (len(batch),), generator=generator).to(DEVICE)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, at values that are not finite
@pytest.mark.parametrize(
    ("adaptation", "dtype"),
    [
        pytest.param("xbm", torch.float16, marks=pytest.mark.slow),
        ("axbn", torch.float32),
        pytest.param("xbn", torch.float32, marks=pytest.mark.slow),
        pytest.param("xbn", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("literal", torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kernels_equal_pytorch(adaptation, dtype):
    plain, fused = (FeatureQueue(M, D, ADAPTATIONS[adaptation], labels=True, dtype=dtype, device=DEVICE) for _ in "ab")
    plain.implementation, fused.implementation = "torch", "triton"
    # The interpreter cuts off where a GPU rounds to bfloat16.
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-2}[dtype]
    for step, (batch, labels) in enumerate(batches(dtype)):
        for queue in (plain, fused):
            queue.adapt(batch)
        assert torch.equal(plain.enqueue(batch, labels), fused.enqueue(batch, labels)), step
        for name in ("written", "offered", "skipped", "labels"):
            assert torch.equal(getattr(plain, name), getattr(fused, name)), (step, name)
        expected, actual = (torch.cat(list(queue.moments())) for queue in (plain, fused))
        assert (actual - expected).norm() <= tolerance * expected.norm(), step
        assert (fused.features() - plain.features()).norm() <= tolerance * plain.features().norm(), step
        for state, reference in zip(fused.adaptation.buffers(), plain.adaptation.buffers(), strict=True):
            torch.testing.assert_close(state, reference, rtol=1e-6, atol=1e-9)
    assert int(fused.ticket) == 0
    assert int(fused.skipped) > 0


def test_own_adaptations_and_float64_rows_use_pytorch():
    for queue in (FeatureQueue(M, D, type("Own", (AXBN,), {})()), FeatureQueue(M, D, dtype=torch.float64)):
        queue.implementation = "triton"
        assert queue_kernels(queue, torch.zeros(4, D)) is None
