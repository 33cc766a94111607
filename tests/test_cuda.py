"""What runs on a CUDA device equals the CPU or a float64 reference. Skipped without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from selfsup_xbn import FeatureQueue
from selfsup_xbn.config.modes import PretrainConfig, SuperviseConfig
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data import Batches, ImageData, RandomBatches, Split, eval_batches, load_data
from selfsup_xbn.data.augmentations import ColorViews
from selfsup_xbn.data.prefetch import _copy_stream, on_device
from selfsup_xbn.evaluation import knn_classify, recall_at_k
from selfsup_xbn.losses import PairMargin, info_nce, nt_xent, sup_con
from selfsup_xbn.memory.row_images import RowImages
from selfsup_xbn.models.split_batch_norm import SplitBatchNorm2d
from selfsup_xbn.training.run import Run
from selfsup_xbn.training.state import restore, state_of
from selfsup_xbn.training.trainer import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = "cuda"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(value: torch.Tensor | None, reference: torch.Tensor | None) -> float:
    assert value is not None
    assert reference is not None
    reference = reference.double().cpu()
    return ((value.double().cpu() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("adaptation", ["xbm", "xbn", "axbn"])
@pytest.mark.parametrize("batch_size", [32, 37, 128])
def test_queue_equals_cpu_queue_over_300_steps(adaptation: str, batch_size: int) -> None:
    queues = [FeatureQueue(300, 24, adaptation, labels=True, device=device) for device in ("cpu", CUDA)]
    for step in range(300):
        batch = draw(batch_size, 24, seed=step) * (1 + step / 100) + step / 50
        if step % 97 == 3:
            batch[3, 5] = float("nan")
        labels = torch.arange(batch_size) + step
        slots = []
        for queue, device in zip(queues, ("cpu", CUDA), strict=True):
            queue.adapt(batch.to(device))
            slots.append(queue.enqueue(batch.to(device), labels.to(device)).cpu())
        assert torch.equal(*slots)
    on_cpu, on_gpu = queues
    assert on_cpu.labels is not None
    assert on_gpu.labels is not None
    assert torch.equal(on_cpu.labels, on_gpu.labels.cpu())
    assert len(on_cpu) == len(on_gpu)
    assert int(on_cpu.skipped) == int(on_gpu.skipped) == 4
    torch.testing.assert_close(on_gpu.features().cpu(), on_cpu.features(), rtol=1e-5, atol=1e-5)
    for value, expected in zip(on_gpu.moments(), on_cpu.moments(), strict=True):
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-7, atol=1e-7)


def test_row_images_equal_the_cpu() -> None:
    queues = [FeatureQueue(100, 8, "xbn", device=device) for device in ("cpu", CUDA)]
    images = [RowImages(queue, sample=30) for queue in queues]
    for step in range(9):
        batch, index = draw(32, 8, seed=step) + step / 10, torch.arange(32) * step
        for queue, rows, device in zip(queues, images, ("cpu", CUDA), strict=True):
            queue.adapt(batch.to(device))
            queue.enqueue(batch.to(device))
            rows.record(index.to(device))
            if step > 1:
                rows.renew(rows.stalest(7), draw(7, 8, seed=100 + step).to(device))
    for name, value in images[0].state_dict().items():
        torch.testing.assert_close(images[1].state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(queues[1].features().cpu(), queues[0].features(), rtol=1e-5, atol=1e-5)
    now = draw(30, 8, seed=7)
    for value, expected in zip(images[1].residuals(now.to(CUDA)), images[0].residuals(now), strict=True):
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-5)


def cosines(anchors: torch.Tensor, queue: FeatureQueue) -> torch.Tensor:
    rows = queue.features().double().cpu()
    return torch.nn.functional.normalize(anchors) @ torch.nn.functional.normalize(rows).T


@pytest.mark.parametrize(("B", "M", "D"), [(33, 257, 24), (128, 4096, 128)])
@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_info_nce_equals_float64(B: int, M: int, D: int, temperature: float) -> None:
    queue = FeatureQueue(M, D, "xbn", device=CUDA)
    queue.enqueue(draw(M, D, seed=1).to(CUDA))
    q, k = (draw(B, D, seed=seed).to(CUDA).requires_grad_() for seed in (2, 3))
    queue.adapt(k)
    slots = queue.enqueue(k)
    loss = info_nce(q, k, queue, temperature, slots)
    loss.backward()
    q64, k64 = (t.detach().double().cpu().requires_grad_() for t in (q, k))
    positive = torch.nn.functional.cosine_similarity(q64, k64)[:, None] / temperature
    negative = (cosines(q64, queue) / temperature).scatter(1, slots.cpu()[:, None], -torch.inf)
    expected = (torch.cat([positive, negative], 1).logsumexp(1) - positive[:, 0]).mean()
    expected.backward()
    assert abs(loss.item() / expected.item() - 1) < 1e-5
    assert relative_error(q.grad, q64.grad) < 1e-4
    assert relative_error(k.grad, k64.grad) < 1e-4


@pytest.mark.parametrize("loss", [sup_con, nt_xent])
@pytest.mark.parametrize("miner", [None, PairMargin(0.2, 1.4)])
@pytest.mark.parametrize("moment_gradient", [False, True])
def test_class_losses_equal_the_cpu(loss: Any, miner: PairMargin | None, moment_gradient: bool) -> None:
    values, grads = [], []
    for device in ("cpu", CUDA):
        queue = FeatureQueue(500, 24, "xbn", labels=True, device=device)
        queue.enqueue(draw(450, 24, seed=1).to(device), (torch.arange(450) % 40).to(device))
        z, labels = draw(40, 24, seed=2).to(device).requires_grad_(), (torch.arange(40) // 4).to(device)
        queue.adapt(z)
        slots = queue.enqueue(z, labels)
        adapted_to = z if moment_gradient else None
        value = loss(z, labels, queue, temperature=0.1, miner=miner, self_indices=slots, adapted_to=adapted_to)
        value.backward()
        values.append(value.item())
        grads.append(z.grad)
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert relative_error(grads[1], grads[0]) < 1e-4


@pytest.mark.parametrize("loss", [info_nce, sup_con])
def test_sums_over_many_rows_are_those_of_float32(loss: Any) -> None:
    queue = FeatureQueue(200_000, 64, "xbn", labels=True, device=CUDA)
    queue.enqueue(draw(200_000, 64, seed=1).to(CUDA), torch.arange(200_000, device=CUDA) % 500)
    z, labels = draw(64, 64, seed=2).to(CUDA).requires_grad_(), torch.arange(64, device=CUDA) // 4
    queue.adapt(z)
    double = FeatureQueue(200_000, 64, "xbm", labels=True, dtype=torch.float64, device=CUDA)
    double.enqueue(queue.features().double(), queue.labels)
    z64 = z.detach().double().requires_grad_()
    grads = []
    for x, memory in ((z, queue), (z64, double)):
        value = info_nce(x, x.detach().flip(0), memory) if loss is info_nce else sup_con(x, labels, memory)
        grads.append(torch.autograd.grad(value, x)[0])
    assert relative_error(*grads) < 5e-6  # the accumulators of the tensor cores alone: 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_batch_norm_equals_parts(dtype: torch.dtype, layout: torch.memory_format) -> None:
    norm = SplitBatchNorm2d(16, 4).to(CUDA)
    parts = torch.nn.BatchNorm2d(16).double()
    images = draw(32, 16, 8, 8).to(CUDA, dtype).contiguous(memory_format=layout).requires_grad_()
    reference = images.detach().double().cpu().requires_grad_()
    weight = draw(32, 16, 8, 8, seed=1)
    output = norm(images)
    (output.float() * weight.to(CUDA)).sum().backward()
    expected = torch.cat([parts(part) for part in reference.split(8)])
    (expected * weight.double()).sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert output.is_contiguous(memory_format=layout)
    assert relative_error(output, expected) < limit
    assert relative_error(images.grad, reference.grad) < limit


def test_views_equal_the_cpus_of_the_same_numbers() -> None:
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    family = ColorViews(32, (0.5,) * 3, (0.25,) * 3)
    uniform = torch.rand(64, family.numbers, generator=torch.Generator().manual_seed(1))
    difference = (family(images.to(CUDA), uniform.to(CUDA)).cpu() - family(images, uniform)).abs()
    assert difference.mean() < 1e-5
    assert (difference > 1e-3).double().mean() < 1e-3  # a box may be one pixel off where a root is rounded


@pytest.fixture
def photos(tmp_path: Path) -> ImageData:
    """Files of random pixels, of different sizes."""
    (tmp_path / "photos").mkdir()
    for number in range(24):
        pixels = torch.randint(0, 256, (40 + number, 60 - number, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{number}.png")
    return load_data(f"folder:{tmp_path / 'photos'}", workers=0)


def file_batches(data: ImageData, family: str, device: str) -> Batches:
    sampler = RandomBatches(len(data.train), 4)
    return Batches(data.train, family, data=data, views=2, sampler=sampler, device=device, workers=1)


@pytest.mark.parametrize("family", ["photo", "cifar", "supervised", "none"])
def test_views_of_files_equal_the_cpu(photos: ImageData, family: str) -> None:
    on_cpu, on_gpu = (file_batches(photos, family, device) for device in ("cpu", CUDA))
    for batch, expected in zip(on_gpu.epoch(0), on_cpu.epoch(0), strict=True):
        assert torch.equal(batch.index.cpu(), expected.index)
        for view, other in zip(batch.views, expected.views, strict=True):
            torch.testing.assert_close(view.cpu(), other, rtol=0, atol=2e-6)
    index = torch.arange(7)
    torch.testing.assert_close(on_gpu.views(index, 0, 1, 0).cpu(), on_cpu.views(index, 0, 1, 0), rtol=0, atol=2e-6)


def test_evaluation_views_equal_the_cpu(photos: ImageData) -> None:
    memory = torch.randint(0, 256, (24, 3, 50, 50), dtype=torch.uint8)
    for split in (photos.train, Split(photos.train.labels, memory)):
        views = [torch.cat([*eval_batches(split, photos, device=d, batch_size=5)]).cpu() for d in ("cpu", CUDA)]
        torch.testing.assert_close(*views, rtol=0, atol=1e-4)


def test_next_batch_of_files_waits_for_nothing(photos: ImageData) -> None:
    batches = file_batches(photos, "supervised", CUDA).epoch(0)
    memory = Split(torch.zeros(8).long(), torch.zeros(8, 3, 9, 9).byte())
    for iterator in (batches, eval_batches(memory, photos, device=CUDA, batch_size=2)):
        next(iterator)
        torch.cuda.set_sync_debug_mode("error")
        try:
            next(iterator)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_copied_batches_are_intact_until_the_step_has_used_them() -> None:
    sums = []
    for [tensor] in on_device(([torch.full((2**20,), n)] for n in range(20)), torch.device(CUDA)):
        torch.cuda._sleep(10**7)  # the host, and without precautions the copies, overtake the step
        sums.append(tensor.sum())
        del tensor
    assert [total.item() for total in sums] == [2**20 * n for n in range(20)]


def test_copies_run_during_the_step() -> None:
    device = torch.device(CUDA)
    for warm in (False, True):  # the first pass allocates the memory, which may wait for the device
        batches = on_device(([torch.full((2**20,), n)] for n in range(4)), device)
        next(batches)
        torch.cuda.synchronize()
        torch.cuda._sleep(2 * 10**9 if warm else 1)
        step = torch.cuda.current_stream().record_event()
        next(batches)
        _copy_stream(device).synchronize()  # batch 2 has arrived
    assert not step.query()
    torch.cuda.synchronize()


def test_evaluators_equal_the_cpu() -> None:
    queries, gallery = draw(200, 32), draw(1000, 32, seed=1)
    labels = torch.arange(1000) % 10
    predictions = [knn_classify(queries.to(d), gallery.to(d), labels.to(d), 10, k=20).cpu() for d in ("cpu", CUDA)]
    assert (predictions[0] != predictions[1]).sum() <= 1
    recalls = [recall_at_k(gallery.to(d), labels.to(d), ks=(1, 10)) for d in ("cpu", CUDA)]
    for k, value in recalls[0].items():
        assert recalls[1][k] == pytest.approx(value, abs=0.2)


def digits(**changes: Any) -> PretrainConfig:
    config = replace(RECIPES["digits"], device=CUDA, precision="fp32", drift_every=0, **changes)
    assert isinstance(config, PretrainConfig)
    return config


def queue_of(run: Run) -> FeatureQueue:
    assert run.method.queue is not None
    return run.method.queue


def weights_of(method: Any, encoder: str) -> list[torch.Tensor]:
    return list(getattr(method, encoder).parameters())


def steps_of(config: Config, count: int) -> tuple[Run, list[float]]:
    run = Run(config)
    losses = []
    batches = run.batches.epoch(0)
    for _ in range(count):
        before = run.meter.sums.get("loss", torch.zeros((), device=CUDA)).clone()
        run.train_step(next(batches))
        losses.append((run.meter.sums["loss"] - before).item())
    return run, losses


@pytest.mark.parametrize(
    "changes",
    [
        {"adaptation": "xbm"},
        {"adaptation": "xbn"},
        {"adaptation": "axbn"},
        {"momentum": 0.5, "momentum_schedule": "cosine", "epochs": 1},
        {"bn_splits": 4},
        {"optimizer": "adamw"},
    ],
    ids=str,
)
def test_graph_equals_eager(changes: dict[str, Any]) -> None:
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        eager, expected = steps_of(digits(**changes, cuda_graph=False), 8)
        graph, losses = steps_of(digits(**changes), 8)
    assert graph.graphed is not None
    assert graph.graphed.graph is not None
    # Keys are shuffled by random numbers that a graph draws at other offsets; only BatchNorm's rounding sees the order.
    assert losses == pytest.approx(expected, rel=2e-3)
    assert torch.equal(queue_of(graph).pointer, queue_of(eager).pointer)
    for a, b in zip(weights_of(graph.method, "encoder_k"), weights_of(eager.method, "encoder_k"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def retrieval(**changes: Any) -> SuperviseConfig:
    config = replace(RECIPES["digits-disjoint"], device=CUDA, precision="fp32", drift_every=0, **changes)
    assert isinstance(config, SuperviseConfig)
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {"adaptation": "xbn"},
        {"adaptation": "axbn", "batch_loss_weight": 1.0},
        {"queue_size": "0", "optimizer": "sgd"},
        {"adaptation": "xbm", "miner": "none"},
    ],
    ids=str,
)
def test_supervised_graph_equals_eager(changes: dict[str, Any]) -> None:
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        _, expected = steps_of(retrieval(**changes, cuda_graph=False), 8)
        graph, losses = steps_of(retrieval(**changes), 8)
    assert graph.graphed is not None
    assert graph.graphed.graph is not None
    assert losses == pytest.approx(expected, rel=2e-3)


def test_graph_begins_after_the_head_epochs() -> None:
    run = Run(retrieval(head_epochs=1, epochs=1))
    assert run.graphed is None
    for epoch in range(2):
        for batch in run.batches.epoch(epoch):
            run.train_step(batch)
        run.end_epoch()
    assert run.graphed is not None
    assert run.graphed.replays > 0


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adamw", 0.01)])
def test_resumed_graph_has_the_learning_rates_of_an_uninterrupted_one(optimizer: str, lr: float) -> None:
    config = digits(optimizer=optimizer, warmup_epochs=1.0, lr=lr)
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        whole, expected = steps_of(config, 14)
        first, _ = steps_of(config, 6)
        rest = Run(config)
        restore(rest, to_cpu(state_of(first)))
        for batch in islice(rest.batches.epoch(0, start=6), 8):
            rest.train_step(batch)
    assert rest.graphed is not None
    assert rest.graphed.graph is not None
    assert rest.meter.mean("loss") == pytest.approx(sum(expected) / 14, rel=1e-2)
    for a, b in zip(weights_of(rest.method, "encoder_q"), weights_of(whole.method, "encoder_q"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


def to_cpu(value: Any) -> Any:
    """Return a nested state with its tensors on the CPU, as in a checkpoint that was loaded."""
    if isinstance(value, dict):
        return {name: to_cpu(item) for name, item in value.items()}
    if isinstance(value, list):
        return [to_cpu(item) for item in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def test_queue_is_refreshed_once_a_pass_under_a_graph() -> None:
    run = Run(digits(queue_size="256"))
    batches, queue = run.batches.epoch(0), queue_of(run)
    for _ in range(20):
        run.train_step(next(batches))
        assert int(queue.offered) <= 2 * queue.size
    assert int(queue.written) == 20 * run.config.batch_size


@pytest.mark.parametrize(
    "changes",
    [
        {"adaptation": "xbn"},
        {"adaptation": "axbn", "symmetric": True},
        {"adaptation": "xbn", "enqueue": "after_loss", "momentum_schedule": "cosine"},
        {"adaptation": "xbn", "optimizer": "adamw", "queue_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_step_waits_for_nothing(changes: dict[str, Any]) -> None:
    run = Run(replace(digits(**changes), drift_every=1, cuda_graph=False))
    batches = run.batches.epoch(0)
    for _ in range(3):
        run.train_step(next(batches))
    batch = next(batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["digits", "digits-disjoint"])
def test_run_on_cuda_agrees_with_the_cpu(mode: str, tmp_path: Path) -> None:
    values = []
    for device in ("cpu", CUDA):
        folder = tmp_path / device
        config = replace(RECIPES[mode], device=device, precision="fp32", epochs=8, out=str(folder))
        train(config)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        values.append(records[-1])
    main = "knn_top1" if mode == "digits" else "recall@1"
    assert values[1][main] == pytest.approx(values[0][main], abs=3.0)
    assert values[1]["loss"] == pytest.approx(values[0]["loss"], rel=0.05)
