"""The supervised mode through the command line: resume, the head stage, the memories, the folder, the refusals."""

import os
import signal

import pytest
import torch
from PIL import Image
from test_cli import refused, tree
from training.test_trainer import assert_same_run

from selfsup_xbn.cli import main
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.training.trainer import Run

SMALL = ["supervise", "--limit-train", "300", "--batch-size", "20", "--images-per-class", "4", "--epochs", "2"]
SMALL += ["--drift-every", "4", "--recall-ks", "1,5"]


@pytest.mark.parametrize(
    "memory",
    [
        ["--queue-size", "0"],
        ["--adaptation", "xbm", "--batch-loss-weight", "1"],
        ["--adaptation", "axbn", "--queue-size", "50%", "--memory-start", "5"],
        ["--loss", "TripletMarginLoss", "--miner", "MultiSimilarityMiner"],
    ],
    ids=["none", "xbm*", "axbn", "peer's loss"],
)
def test_stopped_in_the_head_stage_or_later_and_resumed_is_the_run_that_was_not_stopped(tmp_path, memory, monkeypatch):
    options = [*SMALL, *memory, "--head-epochs", "1"]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    steps, step = [], Run.train_step

    def stop_twice(run, batch):
        step(run, batch)
        steps.append(run.step)
        if len(steps) in (7, 22):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "train_step", stop_twice)
    assert main([*options, "--out", str(tmp_path / "parts")]) == 75
    assert checkpoint.load(tmp_path / "parts")["epoch"] == 0
    assert main(["supervise", "--resume", "--out", str(tmp_path / "parts")]) == 75
    assert checkpoint.load(tmp_path / "parts")["epoch"] == 1
    assert main(["supervise", "--resume", "--out", str(tmp_path / "parts")]) == 0
    assert len(steps) == 45
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_ends_with_retrieval_beside_pixels_and_the_untrained_encoder(tmp_path, capsys):
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("Recall@1", "R-precision", "MAP@R", "raw pixels", "untrained encoder", "trained encoder"):
        assert text in printed
    records = read_metrics(tmp_path)
    assert {"recall@1_raw_pixels", "recall@5_untrained", "map@r_untrained"} <= records[0].keys()
    assert {"recall@1", "recall@5", "drift", "drift_max", "gap_mean_before", "gap_std_after"} <= records[2].keys()
    assert records[2]["gap_mean_after"] < 1e-6 < records[2]["gap_mean_before"]
    assert Image.open(tmp_path / "retrieval.png").size[1] > 500
    best = max(records[1:], key=lambda record: record["recall@1"])
    kept = checkpoint.load(tmp_path, checkpoint.BEST)
    assert kept["epoch"] == best["epoch"]
    assert main(["evaluate", "retrieval", "--run", str(tmp_path)]) == 0
    assert f"{records[2]['recall@1']:.2f}" in capsys.readouterr().out
    assert main(["evaluate", "retrieval", "--run", str(tmp_path), "--best"]) == 0
    assert f"{best['recall@1']:.2f}" in capsys.readouterr().out


def test_the_head_stage_leaves_the_backbone_alone(tmp_path):
    torch.manual_seed(0)
    options = [*SMALL, "--head-epochs", "2", "--epochs", "1", "--lr", "0", "--weight-decay", "0"]
    main([*options, "--out", str(tmp_path)])
    method = checkpoint.load(tmp_path)["method"]
    fresh = checkpoint.load(tmp_path, checkpoint.BEST)["method"]
    convolutions = [name for name in method if "backbone" in name and method[name].ndim == 4]
    assert convolutions
    assert all(torch.equal(method[name], fresh[name]) for name in convolutions)
    assert [record["lr"] for record in read_metrics(tmp_path)[1:]] == [0.001, 0.001, 0.0]


def test_every_data_set_serves_every_mode(tmp_path, capsys):
    data = ["--data", "digits-disjoint", "--limit-train", "128"]
    sizes = ["--batch-size", "64", "--queue-size", "64", "--epochs", "1", "--out", str(tmp_path)]
    assert main(["pretrain", *data, *sizes]) == 0
    for kind in ("knn", "retrieval"):
        assert main(["evaluate", kind, "--run", str(tmp_path)]) == 0
        assert main(["evaluate", kind, "--run", str(tmp_path), "--data", "digits"]) == 0
    assert "Recall@1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--queue-size", "120%"], ["--queue-size", "120%"]),
        (["--queue-size", "9999"], ["9999", "901"]),
        (["--batch-size", "21"], ["--batch-size 21", "--images-per-class 4"]),
        (["--batch-size", "40"], ["40", "classes"]),
        (["--loss", "SupConLos"], ["SupConLos", "did you mean SupConLoss"]),
        (["--miner", "PairMarginMine"], ["did you mean PairMarginMiner"]),
        (["--data", "sop:/no/such"], ["/no/such"]),
        (["--head", "l3"], ["l3"]),
        (["--recipe", "digits"], ["digits", "digits-disjoint"]),
        (["--augmentation", "cifar"], ["cifar"]),
    ],
)
def test_faults_are_one_line_that_names_the_value_and_the_cure(tmp_path, capsys, options, parts):
    small = ["supervise", "--batch-size", "20", "--images-per-class", "4", "--out", str(tmp_path / "run"), *options]
    message = refused(capsys, small)
    for part in parts:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_mode_is_not_taken_over(tmp_path, capsys):
    assert main([*SMALL, "--epochs", "1", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert "mode supervise" in refused(capsys, ["pretrain", "--resume", "--out", str(tmp_path)])


def test_image_files_are_learned_from(tmp_path):
    root = tree(tmp_path / "photos", classes=("a", "b", "c"), images=4)
    (root / "train" / "a" / "0.png").unlink()
    Image.new("RGB", (11, 9)).save(root / "train" / "a" / "0.png")  # of another size: read from disk
    options = ["supervise", "--recipe", "omniglot", "--data", f"folder:{root}", "--batch-size", "8", "--epochs", "1"]
    options += ["--queue-size", "100%", "--image-size", "32", "--workers", "0", "--out", str(tmp_path / "run")]
    assert main(options) == 0
    assert read_metrics(tmp_path / "run")[-1]["recall@1"] >= 0
