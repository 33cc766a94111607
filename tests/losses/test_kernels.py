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


def filled(rows=200, classes=5, first=0):
    """Return a queue with class ``first`` and the next ones, and 20 anchors."""
    generator = torch.Generator().manual_seed(0)
    queue = FeatureQueue(rows, 20, "xbn", labels=True, device=DEVICE)
    queue.enqueue(
        torch.randn(rows, 20, generator=generator).to(DEVICE), torch.arange(rows).to(DEVICE) % classes + first
    )
    return queue, torch.randn(20, 20, generator=generator).to(DEVICE)


def classes_of(count, classes=5):
    return torch.arange(count, device=DEVICE) % classes


def value_gradient_and_counts(z, labels, queue, implementation, **options):
    """Return the value of SupCon, its gradient, and its numbers of positive and negative pairs."""
    z, counts = z.detach().requires_grad_(), []
    options["on_pairs"] = lambda *numbers: counts.extend(number.item() for number in numbers)
    loss = sup_con(z, labels, queue, implementation=implementation, **options)
    return loss, torch.autograd.grad(loss, z)[0], counts


def assert_equals_the_matrix(z, labels, queue, **options):
    loss, grad, counts = value_gradient_and_counts(z, labels, queue, "triton", **options)
    expected = value_gradient_and_counts(z.double(), labels, in_float64(queue), "dense", **options)
    assert counts == expected[2]
    assert error(loss, expected[0]) < EXACT
    assert error(grad, expected[1]) < EXACT
    return loss, grad


@pytest.mark.slow
def test_sup_con_in_blocks_of_anchors_equals_the_matrix(monkeypatch):
    from selfsup_xbn.losses import sup_con_kernels

    monkeypatch.setattr(sup_con_kernels, "LOGITS", 1)
    queue, _ = filled(90)
    own = torch.arange(150, device=DEVICE) % 100 - 10
    own = own.where((own >= 0) & (own < 90), -1)
    z = torch.randn(150, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_equals_the_matrix(z, classes_of(150), queue, self_indices=own)


@pytest.mark.parametrize("tolerance", ["highest", pytest.param("high", marks=SLOW)], indirect=True)
def test_programs_of_several_tiles_equal_the_matrix(monkeypatch, tolerance):
    from selfsup_xbn.losses import kernels, sup_con_kernels

    for module in (kernels, sup_con_kernels):
        monkeypatch.setattr(module, "processors", lambda _: 1)
    queue, z = filled(300)
    own = torch.stack([torch.arange(20), torch.arange(20) + 100], 1).to(DEVICE)
    z = z + 3 * queue.rows[:20]
    if tolerance == EXACT:
        miner = PairMargin(0.1, -0.1, "cosine")
        assert_equals_the_matrix(z, classes_of(20), queue, self_indices=own, temperature=0.02, miner=miner)
    q, q64, keys = z.requires_grad_(), z.detach().double().requires_grad_(), queue.rows[:20]
    loss = info_nce(q, keys, queue, 0.1, own, implementation="triton")
    expected = info_nce(q64, keys.double(), in_float64(queue), 0.1, own, implementation="dense")
    assert error(loss, expected) < tolerance
    assert error(torch.autograd.grad(loss, q)[0], torch.autograd.grad(expected, q64)[0]) < tolerance


@pytest.mark.slow
def test_sums_of_more_parts_than_are_loaded_at_a_time(monkeypatch):
    from selfsup_xbn.losses import sup_con_kernels

    monkeypatch.setattr(sup_con_kernels, "parts_at_a_time", lambda *_: 2)
    queue, z = filled()
    assert_equals_the_matrix(z, classes_of(20), queue)


@pytest.mark.slow
def test_anchors_without_negatives_and_with_one_pair_are_not_averaged():
    queue, z = filled(classes=1)
    loss, grad = assert_equals_the_matrix(z, classes_of(20, 1), queue)
    assert loss == 0
    assert not grad.any()
    queue = FeatureQueue(8, 2, "xbm", labels=True, device=DEVICE)
    queue.enqueue(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=DEVICE), classes_of(2))
    # The second anchor has one pair, the loss of the third is 0 in float32, and the last has no positive pair.
    z = torch.tensor([[0.01, 1.0], [1.0, 2.0], [1.0, 0.1], [1.0, 1.0]], device=DEVICE)
    labels, own = torch.tensor([0, 0, 0, 5], device=DEVICE), torch.tensor([-1, 1, -1, 1], device=DEVICE)
    options = {"temperature": 0.02, "implementation": "triton"}
    loss = sup_con(z, labels, queue, self_indices=own, **options)
    assert loss == sup_con(z[:1], labels[:1], queue, self_indices=own[:1], **options) > 0


@pytest.mark.slow
def test_rows_and_anchors_of_zeros():
    queue, z = filled()
    queue.rows[3], z[4] = 0, 0
    _, grad = assert_equals_the_matrix(z, classes_of(20), queue)
    assert not grad[4].any()


@pytest.mark.slow
def test_views_and_labels_of_64_bits():
    queue, z = filled(first=2**32)
    z, labels = z.T.contiguous().T, (classes_of(40) + 2**32)[::2]
    labels[::4] -= 2**32
    own = torch.arange(80, device=DEVICE).view(2, 40).T[::2]
    assert_equals_the_matrix(z, labels, queue, self_indices=own)
    assert_equals_the_matrix(z, torch.tensor(2**32, device=DEVICE).expand(20), queue)
    losses = [info_nce(z, z, queue, 0.1, own, implementation=name) for name in ("triton", "dense")]
    assert error(*losses) < EXACT


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.slow
@pytest.mark.parametrize("filling", ["empty", "full"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_the_loss_of_an_anchor_without_pairs(value, filling):
    queue, z = filled()
    if filling == "empty":
        queue.reset()
    labels = classes_of(20)
    labels[3], z[3, 2] = 9, value
    assert sup_con(z, labels, queue, implementation="triton").isnan()


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


@pytest.mark.parametrize("loss", [info_nce, sup_con])
def test_second_derivatives_are_refused(loss):
    queue, queries, keys, labels, *_ = drawn("odd")
    q = queries.requires_grad_()
    value = loss(q, keys if loss is info_nce else labels, queue, implementation="triton")
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(value, q, create_graph=True)


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
