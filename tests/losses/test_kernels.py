"""InfoNCE and SupCon as Triton kernels against the matrix in float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from selfsup_xbn import FeatureQueue
from selfsup_xbn.errors import UserError
from selfsup_xbn.losses import PairMargin, functional, info_nce, nt_xent, sup_con
from selfsup_xbn.memory import device
from selfsup_xbn.memory.sharding import ShardedQueue

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT, TF32 = 2e-5, 3e-3
CASES = {  # B, M, D, T, dtype of the rows, passes of the queue, own slots of an anchor
    "odd": (19, 75, 24, 0.1, torch.float32, 3, 1),
    "bfloat16": (17, 48, 32, 0.1, torch.bfloat16, 2, 1),
    "partly filled": (8, 130, 16, 0.1, torch.float32, 0.2, 1),
    "cold": (33, 70, 64, 0.02, torch.float32, 2, 1),
    "two own slots": (20, 70, 20, 1.0, torch.float32, 2, 2),
    "no own slots": (20, 70, 20, 0.5, torch.float16, 2, 0),
    "wide": (18, 40, 300, 0.1, torch.float32, 1, 1),
}
SLOW = pytest.mark.slow


@pytest.fixture(params=["highest", "high"])
def tolerance(request):
    """The precision of torch's float32 products, and the error that it allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield EXACT if request.param == "highest" else TF32
    torch.set_float32_matmul_precision(before)


def drawn(case):
    """Return queue, queries, keys, labels, temperature and own slots."""
    batch, rows, dim, temperature, dtype, passes, own = CASES[case]
    generator = torch.Generator().manual_seed(0)
    queue = FeatureQueue(rows, dim, "xbn", labels=True, dtype=dtype, device=DEVICE)
    for i in range(max(1, int(passes * rows / batch))):
        keys = (torch.randn(batch, dim, generator=generator) * (1 + 0.1 * i) + 0.2 * i).to(DEVICE)
        queue.adapt(keys)
        slots = queue.enqueue(keys, torch.randint(0, 5, (batch,), generator=generator).to(DEVICE))
    labels = torch.randint(0, 5, (batch,), generator=generator).to(DEVICE)
    queries = keys + 0.5 * torch.randn(batch, dim, generator=generator).to(DEVICE)
    indices = {0: None, 1: slots, 2: torch.stack([slots, slots.roll(1)], 1)}[own]
    return queue, queries, keys, labels, temperature, indices


def in_float64(queue):
    """Return a queue whose float64 rows are the embeddings of another one."""
    double = FeatureQueue(queue.size, queue.dim, "xbm", labels=True, dtype=torch.float64, device=DEVICE)
    rows = queue.affine_map()(queue.rows).double()[: len(queue)]
    double.enqueue(rows, queue.labels[: len(queue)])
    return double


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize(
    ("tolerance", "case"),
    [
        ("highest", "odd"),
        *(pytest.param("highest", case, marks=SLOW) for case in CASES if case != "odd"),
        *(pytest.param("high", case, marks=SLOW) for case in CASES),
    ],
    indirect=["tolerance"],
)
def test_info_nce_equals_the_matrix(case, tolerance):
    queue, queries, keys, _, temperature, indices = drawn(case)
    q, k = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    loss = info_nce(q, k, queue, temperature, indices, implementation="triton")
    (3 * loss).backward()
    q64, k64 = queries.double().requires_grad_(), keys.double().requires_grad_()
    expected = info_nce(q64, k64, in_float64(queue), temperature, indices, implementation="dense")
    (3 * expected).backward()
    assert error(loss, expected) < tolerance
    assert error(q.grad, q64.grad) < tolerance
    assert error(k.grad, k64.grad) < tolerance


@pytest.mark.parametrize("miner", [None, PairMargin(0.9, 0.1, "cosine")], ids=["all", "miner"])
@pytest.mark.parametrize(
    ("tolerance", "case"),
    [
        ("highest", "odd"),
        *(pytest.param("highest", case, marks=SLOW) for case in ("bfloat16", "cold", "wide")),
        *(pytest.param("high", case, marks=SLOW) for case in ("odd", "bfloat16", "cold", "wide")),
    ],
    indirect=["tolerance"],
)
def test_sup_con_equals_the_matrix(case, miner, tolerance):
    queue, queries, _, labels, temperature, indices = drawn(case)
    counts = []

    def value(z, memory, implementation):
        return sup_con(
            z,
            labels,
            memory,
            temperature=temperature,
            miner=miner,
            self_indices=indices,
            implementation=implementation,
            on_pairs=lambda *numbers: counts.append(torch.stack(numbers)),
        )

    z, z64 = queries.clone().requires_grad_(), queries.double().requires_grad_()
    loss, expected = value(z, queue, "triton"), value(z64, in_float64(queue), "dense")
    if tolerance == TF32 and miner is not None:
        tolerance = 2e-2  # pairs on a margin are counted by the one and not by the other
    assert error(*counts) <= tolerance * (tolerance > EXACT)
    assert error(loss, expected) < tolerance
    assert error(*(torch.autograd.grad(3 * v, x)[0] for v, x in ((loss, z), (expected, z64)))) < tolerance


def test_sup_con_in_blocks_of_anchors_equals_the_matrix(monkeypatch):
    from selfsup_xbn.losses import kernels

    monkeypatch.setattr(kernels, "LOGITS", 1)
    generator = torch.Generator().manual_seed(0)
    queue = FeatureQueue(90, 20, "xbn", labels=True, device=DEVICE)
    z, labels = torch.randn(150, 20, generator=generator).to(DEVICE), torch.arange(150).to(DEVICE) // 3
    queue.enqueue(z[:90], labels[:90])
    own = torch.arange(150).to(DEVICE) % 100 - 10
    own = own.where((own >= 0) & (own < 90), -1)
    counts, losses, grads = [], [], []
    for x, memory, implementation in ((z, queue, "triton"), (z.double(), in_float64(queue), "dense")):
        x = x.detach().requires_grad_()
        loss = sup_con(
            x,
            labels,
            memory,
            self_indices=own,
            implementation=implementation,
            on_pairs=lambda *numbers: counts.append(torch.stack(numbers)),
        )
        losses.append(loss)
        grads.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*counts)
    assert error(*losses) < EXACT
    assert error(*grads) < EXACT


@pytest.mark.slow
def test_bfloat16_embeddings_get_a_gradient_of_their_dtype():
    queue, queries, keys, labels, temperature, indices = drawn("odd")
    q = queries.bfloat16().requires_grad_()
    loss = info_nce(q, keys, queue, temperature, indices, implementation="triton")
    loss = loss + sup_con(q, labels, queue, self_indices=indices, implementation="triton")
    loss.backward()
    wide = q.detach().float().requires_grad_()
    expected = info_nce(wide, keys, queue, temperature, indices) + sup_con(wide, labels, queue, self_indices=indices)
    expected.backward()
    assert q.grad.dtype == torch.bfloat16
    assert error(loss, expected) < 1e-5
    assert error(q.grad, wide.grad) < 1e-2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.slow
def test_nan_reaches_the_loss():
    queue, queries, keys, labels, temperature, indices = drawn("odd")
    queries[3, 2] = torch.nan
    assert info_nce(queries, keys, queue, temperature, indices, implementation="triton").isnan()
    assert sup_con(queries, labels, queue, self_indices=indices, implementation="triton").isnan()


def test_second_derivatives_are_refused():
    queue, queries, keys, _, temperature, indices = drawn("odd")
    q = queries.requires_grad_()
    loss = info_nce(q, keys, queue, temperature, indices, implementation="triton")
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, q, create_graph=True)


def test_float64_and_nt_xent_are_refused():
    queue, queries, keys, labels, *_ = drawn("odd")
    with pytest.raises(UserError, match="no float64"):
        info_nce(queries.double(), keys.double(), queue, implementation="triton")
    with pytest.raises(UserError, match="'triton'"):
        nt_xent(queries, labels, queue, implementation="triton")


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    device.has_triton.cache_clear()
    try:
        z = torch.randn(4, 8)
        queue = FeatureQueue(8, 8)
        queue.implementation = "triton"
        assert device.queue_kernels(queue, z) is None
        with pytest.raises(UserError, match="expected Triton and a GPU"):
            info_nce(z, z, queue, implementation="triton")
    finally:
        device.has_triton.cache_clear()


def test_empty_batch_is_zero():
    queue = FeatureQueue(8, 4, "xbn", device=DEVICE)
    q = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    assert info_nce(q, F.normalize(q), queue).item() == 0


def test_shards_and_shared_anchors_do_not_reach_the_kernels(monkeypatch):
    from selfsup_xbn.losses import kernels
    from selfsup_xbn.memory import kernels as queue_kernels

    queue, _, keys, labels, temperature, own = drawn("odd")
    shard = ShardedQueue(75, 24, "xbn", labels=True, device=DEVICE)
    shard.load_state_dict(queue.state_dict())
    cases = ((shard, {}), (queue, {"sum_counts": torch.Tensor.clone}))
    for memory, options in cases:
        with pytest.raises(UserError, match="all rows in one process"):
            sup_con(keys, labels, memory, implementation="triton", **options)
    expected = sup_con(keys, labels, queue, temperature=temperature, self_indices=own, implementation="blockwise")
    for module in (functional, device):
        monkeypatch.setattr(module, "has_kernels", lambda _: True)  # as on a GPU
    for module, name in ((kernels, "sup_con"), (queue_kernels, "adapt"), (queue_kernels, "enqueue")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a kernel was called"))
    for memory, options in cases:
        loss = sup_con(keys, labels, memory, temperature=temperature, self_indices=own, **options)
        torch.testing.assert_close(loss, expected)
    shard.adapt(keys)
    shard.enqueue(keys, labels)
    with pytest.raises(pytest.fail.Exception, match="a kernel was called"):
        sup_con(keys, labels, queue)
    with pytest.raises(UserError, match="temperature for a sharded queue"):
        info_nce(keys, keys, shard, torch.tensor(0.1, device=DEVICE))
