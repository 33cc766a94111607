"""Renewal and drift residual in a run: resuming bit for bit, what they leave unchanged, and what they embed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from selfsup_xbn.cli import main
from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.errors import UserError
from selfsup_xbn.memory.row_images import RowImages
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.training.metrics import MetricAccumulator
from selfsup_xbn.training.renewal import running_statistics_kept
from selfsup_xbn.training.run import Run
from tests.command_line import interrupted_at
from tests.finished_runs import differences

CONFIG = replace(
    RECIPES["digits-disjoint"], batch_size=20, images_per_class=4, limit_train=120, queue_size="80", epochs=2,
    drift_every=2, augmentation="none",
)  # fmt: skip
OPTIONS = ["supervise", "--data", "digits-disjoint", "--batch-size", "20", "--images-per-class", "4"]
OPTIONS += [
    "--limit-train",
    "120",
    "--queue-size",
    "80",
    "--epochs",
    "2",
    "--drift-every",
    "2",
    "--augmentation",
    "none",
]
BOTH = ["--renew", "7", "--drift-residual", "--moment-gradient"]


def trained(**changes):
    run = Run(replace(CONFIG, **changes))
    batches = [batch for epoch in range(2) for batch in run.batches.epoch(epoch)]
    for number, batch in enumerate(batches):
        run.epoch, run.step = divmod(number, run.steps)
        yield run, batch


@torch.no_grad()
def embedded(run, images):
    """Return the unit embeddings of training images without augmentation, with their own BatchNorm statistics."""
    pixels, encoder = run.data.train.images[images], run.method.encoder
    mean, std = (torch.tensor(values)[:, None, None] for values in (run.data.mean, run.data.std))
    with running_statistics_kept(encoder):
        return F.normalize(encoder((pixels.float() / 255 - mean) / std), dim=1)


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(tmp_path):
    options = [*OPTIONS, *BOTH]
    assert main([*options, "--out", str(tmp_path / "uninterrupted")]) == 0
    with interrupted_at(4, 9):  # in the middle of both epochs
        assert main([*options, "--out", str(tmp_path / "resumed")]) == 75
        assert main(["supervise", "--resume", "--out", str(tmp_path / "resumed")]) == 75
        assert main(["supervise", "--resume", "--out", str(tmp_path / "resumed")]) == 0
    assert differences(tmp_path / "uninterrupted", tmp_path / "resumed") == []
    assert 0 < read_metrics(tmp_path / "resumed")[-1]["residual"] < 4


@pytest.mark.slow
def test_a_resumed_run_of_files_equals_uninterrupted_run(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in "abc":
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (34 + index % 3, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{index}.png")
    options = ["supervise", "--data", f"folder:{tmp_path / 'photos'}", "--batch-size", "12", "--queue-size", "24"]
    options += ["--epochs", "2", "--image-size", "32", "--recipe", "digits-disjoint", "--drift-every", "2", *BOTH]
    options += ["--images-per-class", "4"]
    assert main([*options, "--workers", "2", "--out", str(tmp_path / "uninterrupted")]) == 0
    with interrupted_at(4):
        assert main([*options, "--workers", "0", "--out", str(tmp_path / "resumed")]) == 75
        assert main(["supervise", "--resume", "--out", str(tmp_path / "resumed")]) == 0
    assert differences(tmp_path / "uninterrupted", tmp_path / "resumed") == []


@pytest.mark.slow
def test_the_drift_residual_changes_nothing(tmp_path):
    for name, options in (("with", ["--drift-residual"]), ("without", [])):
        assert main([*OPTIONS, "--out", str(tmp_path / name), *options]) == 0
    measured, plain = (read_metrics(tmp_path / name)[-1] for name in ("with", "without"))
    added = {"residual", "residual_unadapted"}
    assert {*measured} - {*plain} == added
    assert {name for name in plain if plain[name] != measured[name]} <= {"images_per_second"}
    assert 0 < measured["residual"] < measured["residual_unadapted"]


def test_images_of_rows_are_those_of_the_batches():
    seen = []
    for run, batch in trained(renew=7):
        run.train_step(batch)
        seen.extend(batch.index.tolist())
        rows = len(run.method.queue)
        slots = [(len(seen) - 1 - age) % run.method.queue.size for age in range(rows)]
        assert run.renewal.rows.images[slots].tolist() == seen[::-1][:rows]
    assert rows == run.method.queue.size < len(seen)


def test_renewed_rows_are_embeddings_of_today():
    """Without augmentation, with the BatchNorm statistics of the renewed images, and no running statistics changed."""
    renewed = 0
    for run, batch in trained(renew=7):
        rows, encoder = run.renewal.rows, run.method.encoder
        state = {name: value.clone() for name, value in encoder.state_dict().items()}
        before, times = run.method.queue.features(), rows.recorded_at.clone()
        run.renewal.renew(run.epoch, run.step, run.epoch * run.steps + run.step)
        changed = (rows.recorded_at != times).nonzero()[:, 0]
        if len(changed):
            assert len(changed) == 21  # 7 a step, each third step
            expected = embedded(run, rows.images[changed])
            now = run.method.queue.features()
            torch.testing.assert_close(now[changed], expected, rtol=1e-4, atol=1e-5)
            others = torch.ones(len(now), dtype=torch.bool).index_fill(0, changed, False)
            torch.testing.assert_close(now[others], before[others])
            renewed += 1
        assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
        run.renewal.interval, interval = 0, run.renewal.interval
        run.train_step(batch)
        run.renewal.interval = interval
    assert renewed >= 2


@pytest.mark.parametrize(
    ("changes", "steps", "rows"),
    [
        ({"renew": 7}, [(0, 3), (1, 0), (1, 3)], 21),  # 7 a step, each third step
        ({"renew": 50}, [(0, 3), (0, 4), (0, 5), *((1, step) for step in range(6))], 50),  # once 50 rows are there
        ({"renew": 7, "head_epochs": 1}, [(1, 3), (2, 0), (2, 3)], 21),  # a head epoch fills no queue
    ],
)
def test_a_run_renews_rows_when_it_is_time(changes, steps, rows, monkeypatch):
    seen, drawn = [], []
    monkeypatch.setattr(RowImages, "renew", lambda self, slots, embeddings: seen.append((len(slots), len(embeddings))))
    run = Run(replace(CONFIG, **changes))
    views = run.renewal.views
    run.renewal.views = lambda images, *seed: (drawn.append((len(images), *seed)), views(images, *seed))[1]
    times = []
    for epoch in range(run.epochs):
        for batch in run.batches.epoch(epoch):
            before = len(seen)
            run.train_step(batch)
            times += [(epoch, run.step - 1)] * (len(seen) - before)
        run.end_epoch()
    assert times == steps
    assert seen == [(rows, rows)] * len(steps)
    parts = max(1, rows // 20)
    sizes = [len(part) for part in torch.arange(rows).tensor_split(parts)]
    assert drawn == [(size, *step, part) for step in steps for part, size in enumerate(sizes)]  # each its own seed


def test_the_moment_gradient_of_a_run_changes_weights_and_not_the_loss():
    losses, weights = [], []
    for option in (True, False):
        steps = trained(moment_gradient=option, adaptation="xbn")
        for _ in range(2):  # the first one has no rows of other batches
            run, batch = next(steps)
            before = run.meter.sums.get("loss", torch.zeros(())).clone()
            run.train_step(batch)
        losses.append(run.meter.sums["loss"] - before)
        weights.append(torch.cat([weight.detach().flatten() for weight in run.method.encoder.parameters()]))
    assert torch.equal(*losses)
    assert (weights[0] - weights[1]).norm() > 1e-4


def draw_random_numbers(*_):
    """Do what dropout does to the random state."""
    torch.rand(())


def test_residuals_are_of_the_images_of_the_rows():
    """All 80 rows are sampled; their images are embedded by hand, in the batches of 20 that the run embeds."""
    for run, batch in trained(drift_residual=True):
        run.train_step(batch)
        rows, encoder, meter = run.renewal.rows, run.method.encoder, MetricAccumulator(run.device)
        drawing = encoder.register_forward_pre_hook(draw_random_numbers)
        state = torch.get_rng_state()
        run.renewal.measure(meter, run.epoch, run.step)
        assert torch.equal(torch.get_rng_state(), state)
        drawing.remove()
        parts = [embedded(run, part) for part in rows.images.clamp(min=0).split(20)]
        now = torch.cat(parts)[: len(run.method.queue)]
        expected = (F.normalize(run.method.queue.features(), dim=1) - now).square().sum(1).mean()
        assert meter.mean("residual") == pytest.approx(expected.item(), rel=1e-4)
        assert 0 < meter.mean("residual_unadapted") < 4


def test_a_head_epoch_has_no_residual():
    run = Run(replace(CONFIG, drift_residual=True, head_epochs=1))
    for expected in (False, True):
        for batch in run.batches.epoch(run.epoch):
            run.train_step(batch)
        assert ("residual" in run.end_epoch()) == expected


def test_running_statistics_are_kept_and_batch_statistics_used():
    norm = nn.BatchNorm1d(3)
    rows = torch.randn(10, 3) * 5 + 2
    with running_statistics_kept(nn.Sequential(norm)):
        output = norm(rows)
    torch.testing.assert_close(output.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    assert norm.running_mean.tolist() == [0, 0, 0]
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"renew": 4, "queue_size": "0"}, "--renew: expected a memory, got --queue-size 0"),
        ({"drift_residual": True, "queue_size": "0"}, "--drift-residual: expected a memory"),
        ({"moment_gradient": True, "shard_queue": True}, "--moment-gradient: expected all rows in each process"),
        ({"renew": -1}, "--renew"),
        ({"drift_residual": True, "drift_every": 0}, "--drift-residual: expected --drift-every above 0, got 0"),
        ({"drift_residual": True, "accumulate": 2}, "--drift-residual: expected --accumulate 1, got 2"),
    ],
)
def test_invalid_options_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SuperviseConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"renew": 81}, "--renew: expected at most the number of rows of the queue, 80, got 81"),
        ({"renew": 1, "queue_size": "1"}, "--renew: expected a queue of at least 2 rows, got 1"),
        ({"drift_residual": True, "queue_size": "1"}, "--drift-residual: expected a queue of at least 2 rows, got 1"),
    ],
)
def test_a_queue_that_is_too_small_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Run(replace(CONFIG, **changes))


def test_the_moment_gradient_needs_rows_that_follow(capsys):
    assert main([*OPTIONS, "--moment-gradient", "--adaptation", "axbn"]) == 2
    assert "--moment-gradient: expected --adaptation xbn, got axbn" in capsys.readouterr().err
    assert main(["pretrain", "--moment-gradient"]) == 2
    assert "an option of supervise: in pretrain the moments are those of keys" in capsys.readouterr().err
    assert main(["compare", "pretrain", "--vary", "moment-gradient=true,false"]) == 2
    assert "an option of supervise: in pretrain the moments are those of keys" in capsys.readouterr().err
