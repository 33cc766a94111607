"""The loop, through the command line: resume to the last bit, refusals that write nothing, signals, results."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup_xbn.cli import main
from selfsup_xbn.config.schema import PretrainConfig
from selfsup_xbn.errors import Diverged
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.training.optimisation import learning_rate
from selfsup_xbn.training.trainer import Run, train

SMALL = ["--limit-train", "256", "--batch-size", "64", "--queue-size", "128", "--epochs", "2", "--drift-every", "2"]


def weights(folder):
    return checkpoint.load(folder)["method"]


def assert_same_run(a, b):
    """Weights, queue and every logged number but the times."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    timeless = [[{k: v for k, v in r.items() if k != "images_per_second"} for r in read_metrics(f)] for f in (a, b)]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A tree of small photographs of no two sizes, so that they are read from disk while training."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (34 + index % 3, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.parametrize("adaptation", ["xbm", "xbn", "axbn"])
def test_stopped_at_the_end_and_in_the_middle_of_an_epoch_and_resumed_is_the_run_that_was_not_stopped(
    tmp_path, adaptation, monkeypatch
):
    options = ["pretrain", *SMALL, "--adaptation", adaptation]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    steps, step = [], Run.train_step

    def stop_twice(run, batch):
        step(run, batch)
        steps.append(run.step)
        if len(steps) in (4, 6):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "train_step", stop_twice)
    assert main([*options, "--out", str(tmp_path / "parts")]) == 75
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "parts")]) == 75
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "parts")]) == 0
    assert steps == [1, 2, 3, 4, 1, 2, 3, 4]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_stopped_and_resumed_with_files_and_workers_too(tmp_path, image_folder, monkeypatch):
    options = [
        "pretrain",
        "--data",
        f"folder:{image_folder}",
        "--batch-size",
        "8",
        "--queue-size",
        "16",
        "--epochs",
        "2",
    ]
    options += ["--image-size", "32", "--backbone", "convnet-digits", "--knn-k", "5"]
    assert main([*options, "--workers", "0", "--out", str(tmp_path / "whole")]) == 0
    steps, step = [], Run.train_step

    def stop_at_step_four(run, batch):
        step(run, batch)
        steps.append(run.step)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "train_step", stop_at_step_four)
    assert main([*options, "--workers", "1", "--out", str(tmp_path / "parts")]) == 75
    assert main(["pretrain", "--resume", "--workers", "2", "--out", str(tmp_path / "parts")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_finished_run_changes_nothing_and_resuming_none_starts_one(tmp_path):
    options = ["pretrain", *SMALL, "--resume", "--out", str(tmp_path / "run")]
    assert main(options) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main(options) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path):
    options = [*SMALL, "--epochs", "9", "--save-every", "2", "--eval-every", "0", "--drift-every", "0"]
    command = [sys.executable, "-m", "selfsup_xbn", "pretrain", *options, "--out", str(tmp_path / "parts")]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: sums of other lengths round otherwise
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
    while not (tmp_path / "parts" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "parts")]) == 0
    assert main(["pretrain", *options, "--out", str(tmp_path / "whole")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_digits_beat_raw_pixels_and_the_untrained_encoder(tmp_path, capsys):
    assert main(["pretrain", "--eval-every", "0", "--drift-every", "0", "--seed", "1", "--out", str(tmp_path)]) == 0
    found = {key: value for record in read_metrics(tmp_path) for key, value in record.items()}
    assert found["knn_top1_backbone"] > found["knn_top1_raw_pixels"]
    assert found["knn_top1_backbone"] > found["knn_top1_backbone_untrained"]
    assert found["knn_top1"] > found["knn_top1_untrained"]
    printed = capsys.readouterr().out
    for text in ("raw pixels", "untrained encoder", "trained encoder", str(tmp_path)):
        assert text in printed
    assert Image.open(tmp_path / "curves.png").size[0] > 300
    assert main(["evaluate", "knn", "--run", str(tmp_path)]) == 0
    assert f"{found['knn_top1_backbone']:.2f}" in capsys.readouterr().out


def test_a_run_folder_says_how_it_was_made(tmp_path):
    main(["pretrain", *SMALL, "--out", str(tmp_path)])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["batch_size"] == 64
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


def test_axbn_logs_its_gain(tmp_path):
    main(["pretrain", *SMALL, "--adaptation", "axbn", "--gain-interval", "1", "--out", str(tmp_path)])
    assert read_metrics(tmp_path)[-1]["gain"] == pytest.approx(0.99984, abs=1e-5)


def test_a_diverged_run_says_where_and_keeps_its_last_checkpoint(tmp_path, capsys, monkeypatch):
    step = Run.train_step

    def poisoned(run, batch):
        if run.epoch == 1:
            next(run.method.encoder_q.parameters()).data.fill_(torch.nan)
        step(run, batch)

    monkeypatch.setattr(Run, "train_step", poisoned)
    assert main(["pretrain", *SMALL, "--out", str(tmp_path)]) == 3
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "epoch 1" in message
    assert "checkpoint.pt" in message
    assert checkpoint.load(tmp_path)["epoch"] == 1


def test_the_random_state_is_part_of_the_checkpoint(tmp_path):
    folder = train(PretrainConfig(limit_train=128, batch_size=64, queue_size=64, epochs=1, out=str(tmp_path)))
    assert torch.equal(checkpoint.load(folder)["random"], torch.get_rng_state())


def test_learning_rates_follow_their_formulas():
    config = PretrainConfig(lr=2.0, epochs=10, warmup_epochs=2.0)
    assert learning_rate(config, 0, 0.5) == pytest.approx(0.5)
    assert learning_rate(config, 5, 0.9) == pytest.approx(1.0)  # cosine by the epoch
    assert learning_rate(PretrainConfig(lr=2.0, schedule="step", epochs=40), 31, 0.0) == pytest.approx(2 * 0.33**2)
    assert learning_rate(PretrainConfig(lr=2.0, schedule="constant"), 7, 0.3) == 2.0


def test_diverged_is_no_user_error():
    assert not issubclass(Diverged, ValueError)
