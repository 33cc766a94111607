"""The training loop through the command line: resuming bit for bit, signals, divergence, results."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup_xbn.cli import main
from selfsup_xbn.config.modes import PretrainConfig
from selfsup_xbn.errors import Diverged
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.training.optimization import learning_rate
from selfsup_xbn.training.trainer import train
from tests.command_line import PRETRAIN, each_step, interrupted_at
from tests.finished_runs import differences

SMALL = [
    "--recipe",
    "digits",
    "--limit-train",
    "128",
    "--batch-size",
    "32",
    "--queue-size",
    "64",
    "--epochs",
    "2",
    "--drift-every",
    "2",
]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """An image folder of several sizes, which is read from disk during training."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (34 + index % 3, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.parametrize(
    "adaptation", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("xbm", "xbn")), "axbn"]
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, adaptation, unchecked):
    options = ["pretrain", *SMALL, "--adaptation", adaptation]
    assert main([*options, "--out", str(tmp_path / "uninterrupted")]) == 0
    with interrupted_at(4, 6) as steps:  # at the end and in the middle of an epoch
        assert main([*options, "--out", str(tmp_path / "resumed")]) == 75
        assert main(["pretrain", "--resume", "--out", str(tmp_path / "resumed")]) == 75
        assert main(["pretrain", "--resume", "--out", str(tmp_path / "resumed")]) == 0
    assert len(steps) == 8
    assert differences(tmp_path / "uninterrupted", tmp_path / "resumed") == []


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
def test_resumed_run_with_workers_equals_uninterrupted_run(tmp_path, image_folder):
    options = ["pretrain", "--data", f"folder:{image_folder}", "--batch-size", "8", "--queue-size", "16"]
    options += ["--epochs", "2", "--image-size", "32", "--backbone", "convnet-digits", "--knn-k", "5"]
    options += ["--eval-every", "0"]
    assert main([*options, "--workers", "0", "--out", str(tmp_path / "uninterrupted")]) == 0
    with interrupted_at(2, by=signal.SIGINT):
        assert main([*options, "--workers", "1", "--out", str(tmp_path / "resumed")]) == 75
        assert main(["pretrain", "--resume", "--workers", "2", "--out", str(tmp_path / "resumed")]) == 0
    assert differences(tmp_path / "uninterrupted", tmp_path / "resumed") == []


def test_resume_starts_a_run_and_leaves_a_finished_one(tmp_path, capsys):
    options = ["pretrain", *SMALL, "--resume", "--out", str(tmp_path / "run")]
    assert main(options) == 0
    assert f"no run in {tmp_path / 'run'}: starting one\n" in capsys.readouterr().out
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main(options) == 0
    assert "already finished\n" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("removed", "line"),
    [
        ([], "continuing after step 1 of epoch 2 of 2"),
        (["checkpoint.pt"], "continuing after epoch 1 of 2"),
        (["checkpoint.pt", "checkpoint-1.pt"], "RUN has no checkpoint: starting"),
    ],
)
def test_resume_states_where_it_continues(tmp_path, capsys, removed, line):
    options = ["pretrain", *SMALL, "--eval-every", "0", "--drift-every", "0", "--out", str(tmp_path)]
    with interrupted_at(5):  # the first step of the second epoch
        assert main(options) == 75
    assert line not in capsys.readouterr().out
    for name in removed:
        (tmp_path / name).unlink()
    assert main([*options, "--resume"]) == 0
    assert line.replace("RUN", str(tmp_path)) in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_killed_process_resumes_from_its_checkpoint(tmp_path):
    options = [*SMALL, "--epochs", "9", "--save-every", "2", "--eval-every", "0", "--drift-every", "0"]
    command = [sys.executable, "-m", "selfsup_xbn", "pretrain", *options, "--out", str(tmp_path / "resumed")]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: sums of other lengths round otherwise
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
    while not (tmp_path / "resumed" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "resumed")]) == 0
    assert main(["pretrain", *options, "--out", str(tmp_path / "uninterrupted")]) == 0
    assert differences(tmp_path / "uninterrupted", tmp_path / "resumed") == []


@pytest.mark.slow
def test_digits_beat_raw_pixels_and_the_untrained_encoder(tmp_path):
    """Compare means over three seeds: one test image is 0.28 points, and rounding changes several."""
    runs = []
    for seed in ("0", "1", "2"):
        options = ["--seed", seed, "--eval-every", "0", "--drift-every", "0", "--out", str(tmp_path / seed)]
        assert main([*PRETRAIN, *options]) == 0
        runs.append({key: value for record in read_metrics(tmp_path / seed) for key, value in record.items()})
    mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key.startswith("knn_top1")}
    assert mean["knn_top1_backbone"] > mean["knn_top1_raw_pixels"]
    assert mean["knn_top1_backbone"] > mean["knn_top1_backbone_untrained"]
    assert mean["knn_top1"] > mean["knn_top1_untrained"]


def test_evaluation_of_a_run_repeats_its_last_values(finished_run, capsys):
    assert main(["evaluate", "knn", "--run", str(finished_run)]) == 0
    last = read_metrics(finished_run)[-1]
    printed = capsys.readouterr().out
    assert f"{last['knn_top1']:.2f}" in printed
    assert f"{last['knn_top1_backbone']:.2f}" in printed


def test_run_ends_with_a_table_and_a_picture(tmp_path, capsys, pictures):
    assert main(["pretrain", *SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    last = read_metrics(tmp_path)[-1]
    for text in ("raw pixels", "untrained encoder", "trained encoder", f"{last['knn_top1']:.2f}", str(tmp_path)):
        assert text in printed
    assert Image.open(tmp_path / "curves.png").size[0] > 300


def test_run_folder_records_settings_and_environment(tmp_path):
    main(["pretrain", *SMALL, "--out", str(tmp_path)])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["batch_size"] == 32
    assert config["environment"]["torch"] == torch.__version__.split("+")[0]
    assert {"commit", "python", "lightly"} <= config["environment"].keys()
    records = read_metrics(tmp_path)
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert {
        "loss",
        "lr",
        "knn_top1",
        "knn_top1_backbone",
        "drift",
        "drift_max",
        "images_per_second",
        "skipped_batches",
    } <= records[1].keys()


def test_axbn_logs_its_gain(tmp_path, plots):
    main(
        [
            "pretrain",
            *SMALL,
            "--adaptation",
            "axbn",
            "--gain-interval",
            "1",
            "--batch-size",
            "64",
            "--out",
            str(tmp_path),
        ]
    )
    assert read_metrics(tmp_path)[-1]["gain"] == pytest.approx(0.99984, abs=1e-5)


def test_diverged_run_names_the_epoch_and_keeps_its_checkpoint(tmp_path, capsys):
    def poison(optimizer):
        if len(steps) == 5:
            optimizer.param_groups[0]["params"][0].data.fill_(torch.nan)

    with each_step(poison) as steps:
        assert main(["pretrain", *SMALL, "--out", str(tmp_path)]) == 3
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "at epoch 2, step " in message  # as the log would number it
    assert "checkpoint.pt" in message
    assert checkpoint.load(tmp_path)["epoch"] == 1


def test_random_state_is_part_of_the_checkpoint(tmp_path):
    train(PretrainConfig(limit_train=128, batch_size=64, queue_size="64", epochs=1, out=str(tmp_path)))
    assert torch.equal(checkpoint.load(tmp_path)["random"], torch.get_rng_state())


def test_learning_rates_follow_their_formulas():
    config = PretrainConfig(lr=2.0, epochs=10, warmup_epochs=2.0)
    assert learning_rate(config, 0, 0.5) == pytest.approx(0.5)
    assert learning_rate(config, 5, 0.9) == pytest.approx(1.0)  # cosine by the epoch
    assert learning_rate(PretrainConfig(lr=2.0, schedule="step", epochs=40), 31, 0.0) == pytest.approx(2 * 0.33**2)
    assert learning_rate(PretrainConfig(lr=2.0, schedule="constant"), 7, 0.3) == 2.0


def test_diverged_is_no_user_error():
    assert not issubclass(Diverged, ValueError)
