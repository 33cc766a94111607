"""Numbers that do not flatter: baselines from the initial weights, two loss curves, gaps, time left, limits."""

from __future__ import annotations

import math

import pytest
import torch

from selfsup_xbn.cli import main
from selfsup_xbn.models.encoder import build_encoder
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.training import progress
from selfsup_xbn.training.progress import Progress
from tests.command_line import image_folder, refused

SMALL = ["supervise", "--recipe", "digits-disjoint", "--limit-train", "160", "--batch-size", "20"]
SMALL += ["--images-per-class", "4", "--epochs", "1", "--drift-every", "4", "--head-epochs", "1", "--queue-size", "80"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that starts from the weights of a file, with a head epoch."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(5)
    encoder = build_encoder("convnet-digits", 128, channels=1, image_size=8)
    torch.save(encoder.backbone.state_dict(), folder / "initial.pt")
    assert main([*SMALL, "--weights", str(folder / "initial.pt"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_baseline_of_a_run_starts_from_its_initial_weights(run, capsys):
    before, *_, last = read_metrics(run)
    assert before["recall@1_backbone_untrained"] != before["recall@1_untrained"]
    assert main(["evaluate", "retrieval", "--run", str(run)]) == 0
    rows = {line[:20].strip(): line.split()[-5:] for line in capsys.readouterr().out.splitlines()}
    columns = ("recall@1", "recall@1_backbone", "recall@10")
    for name, record, suffix in (("untrained encoder", before, "_untrained"), ("trained encoder", last, "")):
        assert rows[name][:3] == [f"{record[column + suffix]:.2f}" for column in columns]


def test_trained_encoder_is_evaluated_alone(run, capsys):
    assert main(["evaluate", "retrieval", "--run", str(run), "--only", "trained", "--limit-test", "200"]) == 0
    printed = capsys.readouterr().out
    assert "trained encoder" in printed
    assert "untrained encoder" not in printed
    assert "raw pixels" not in printed
    assert "test images        3" in printed  # whole classes of 174 to 183 images


def test_head_epochs_have_a_loss_curve_of_their_own(run):
    _, head, main_stage = read_metrics(run)
    assert "loss" not in head
    assert "head_loss" not in main_stage
    assert head["head_loss"] > 0
    assert main_stage["loss"] > 0


def test_gap_is_a_number_in_the_first_epoch_after_the_head_epochs(run):
    record = read_metrics(run)[2]
    for name in ("gap_mean_before", "gap_std_before", "gap_mean_after", "gap_std_after"):
        assert math.isfinite(record[name])


def test_time_left_counts_steps_and_evaluations(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = Progress(total=6, done=0)
    shown.resume()
    shown.step()
    shown.step()
    shown.pause()
    shown.epoch(1, 3, {}, evaluation_seconds=7.0)
    assert capsys.readouterr().out.endswith("11 s left\n")  # 4 steps of a second, and 7 seconds
    shown.close()


def test_pretraining_without_labels_has_no_evaluation(tmp_path, capsys, plots):
    root = image_folder(tmp_path / "photos", classes=("a",), images=8)
    argv = ["pretrain", "--backbone", "convnet4", "--batch-size", "4", "--epochs", "1", "--workers", "0"]
    argv += ["--out", str(tmp_path / "run"), "--data", f"folder:{root}/train/a", "--image-size", "8"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "training images    8 without classes" in printed
    assert "\n\nrun folder" in printed
    assert "\n\n\n" not in printed  # no empty table
    assert "test images        none: the run is not evaluated" in printed
    assert "percent" not in printed
    assert [record["epoch"] for record in read_metrics(tmp_path / "run")] == [0, 1]
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page")]) == 0
    assert "has no test images" in capsys.readouterr().out
    assert "no test images to evaluate" in refused(capsys, ["evaluate", "knn", "--run", str(tmp_path / "run")])


def test_validation_folder_selects_the_best_model(tmp_path):
    root = image_folder(tmp_path / "photos", classes=("a", "b"), images=4)
    (root / "test").rename(root / "val")
    for name in ("a", "b"):
        (root / "test" / f"new {name}").mkdir(parents=True)
        for file in (root / "val" / name).iterdir():
            (root / "test" / f"new {name}" / file.name).write_bytes(file.read_bytes())
    argv = ["supervise", "--backbone", "convnet4", "--weights", "", "--no-freeze-bn", "--image-size", "8"]
    argv += ["--batch-size", "4", "--images-per-class", "2", "--epochs", "1", "--head-epochs", "0", "--workers", "0"]
    assert main([*argv, "--data", f"folder:{root}", "--out", str(tmp_path / "run")]) == 0
    assert "recall@1_validation" in read_metrics(tmp_path / "run")[-1]
    assert (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize(("margins", "share"), [("pos_margin=3,neg_margin=0.000001", 1), ("pos_margin=0.2", 0)])
def test_loss_without_pairs_is_said_and_counted(tmp_path, capsys, margins, share):
    argv = [*SMALL, "--head-epochs", "0", "--miner-args", margins, "--out", str(tmp_path)]
    assert main(argv) == 0
    assert ("100% of the steps had no pairs" in capsys.readouterr().err) == bool(share)
    record = read_metrics(tmp_path)[-1]
    assert record["steps_without_pairs"] == share
    assert (record["loss"] == 0) == bool(share)
