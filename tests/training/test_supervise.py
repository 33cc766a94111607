"""The supervised mode through the command line: resuming, the head stage, the memories, refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup_xbn.cli import main
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics
from tests.command_line import PRETRAIN, SUPERVISE, interrupted_at, refused
from tests.finished_runs import differences

SMALL = [*SUPERVISE, "--limit-train", "160", "--batch-size", "20", "--images-per-class", "4", "--epochs", "2"]
SMALL += ["--drift-every", "4", "--recall-ks", "1,5", "--limit-test", "200"]


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param(["--queue-size", "0"], id="none", marks=pytest.mark.slow),
        pytest.param(["--adaptation", "xbm", "--batch-loss-weight", "1"], id="xbm*", marks=pytest.mark.slow),
        pytest.param(["--adaptation", "axbn", "--queue-size", "50%", "--memory-start", "5"], id="axbn"),
        pytest.param(
            ["--loss", "TripletMarginLoss", "--miner", "MultiSimilarityMiner"], id="peer", marks=pytest.mark.slow
        ),
    ],
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, memory, unchecked):
    options = [*SMALL, *memory, "--head-epochs", "1"]
    assert main([*options, "--out", str(tmp_path / "uninterrupted")]) == 0
    resumed = tmp_path / "resumed"
    with interrupted_at(4, 12) as steps:  # in the head stage and later
        assert main([*options, "--out", str(resumed)]) == 75
        assert checkpoint.load(resumed)["epoch"] == 0
        assert main(["supervise", "--resume", "--out", str(resumed)]) == 75
        assert checkpoint.load(resumed)["epoch"] == 1
        assert main(["supervise", "--resume", "--out", str(resumed)]) == 0
    assert len(steps) == 24
    assert differences(tmp_path / "uninterrupted", resumed) == []


def test_run_ends_with_retrieval_metrics_and_a_gallery(tmp_path, capsys, pictures):
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


@pytest.mark.slow
def test_head_stage_leaves_the_backbone_alone(tmp_path, plots):
    torch.manual_seed(0)
    options = [*SMALL, "--head-epochs", "2", "--epochs", "1", "--lr", "0", "--weight-decay", "0"]
    main([*options, "--out", str(tmp_path)])
    method = checkpoint.load(tmp_path)["method"]
    fresh = checkpoint.load(tmp_path, checkpoint.BEST)["method"]
    convolutions = [name for name in method if "backbone" in name and method[name].ndim == 4]
    assert convolutions
    assert all(torch.equal(method[name], fresh[name]) for name in convolutions)
    assert [record["lr"] for record in read_metrics(tmp_path)[1:]] == [0.001, 0.001, 0.0]


@pytest.mark.slow
def test_every_data_set_serves_every_mode(tmp_path, capsys):
    data = ["--data", "digits-disjoint", "--limit-train", "128"]
    sizes = ["--batch-size", "64", "--queue-size", "64", "--epochs", "1", "--out", str(tmp_path)]
    assert main([*PRETRAIN, *data, *sizes]) == 0
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
        (["--loss", "TripletMarginLoss", "--loss-args", "swap=True"], ["--loss", "IndexError"]),
        (["--loss", "MarginLoss", "--loss-args", "num_classes=4,learn_beta=True"], ["--loss", "IndexError"]),
        (["--loss", "SupConLoss", "--miner", "EmbeddingsAlreadyPackagedAsTriplets"], ["--loss", "AssertionError"]),
        (["--data", "sop:/no/such"], ["/no/such"]),
        (["--head", "l3"], ["l3"]),
        (["--recipe", "digits"], ["digits", "digits-disjoint"]),
        (["--augmentation", "cifar"], ["cifar"]),
    ],
)
def test_error_is_one_line_with_value_and_remedy(tmp_path, capsys, options, parts):
    small = [*SUPERVISE, "--batch-size", "20", "--images-per-class", "4", "--out", str(tmp_path / "run"), *options]
    message = refused(capsys, small)
    for part in parts:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_run_of_another_mode_is_not_resumed(finished_run, capsys):
    assert "mode pretrain" in refused(capsys, ["supervise", "--resume", "--out", str(finished_run)])


def test_training_reads_image_files(tmp_path):
    """Three classes that differ in brightness alone, in several sizes, so that they are read from disk."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for brightness, name in ((60, "a"), (120, "b"), (180, "c")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = rng.normal(brightness, 20, (8 + index, 9, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{index}.png")
    options = ["supervise", "--recipe", "omniglot", "--data", f"folder:{tmp_path / 'photos'}", "--batch-size", "8"]
    options += ["--epochs", "1", "--queue-size", "100%", "--image-size", "16", "--workers", "0"]
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    before, after = read_metrics(tmp_path / "run")
    assert before["recall@1_raw_pixels"] < 50
    assert after["recall@1"] == 100
    assert after["loss"] > 0.5  # the miner kept pairs


def test_an_epoch_without_a_pair_is_a_warning(tmp_path, capsys):
    options = [*SMALL, "--epochs", "1", "--queue-size", "40"]
    options += ["--loss", "TripletMarginLoss", "--loss-args", "margin=-3", "--miner", "none"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    assert "100% of the steps had no pairs" in capsys.readouterr().err


def test_a_dry_run_tries_the_loss(tmp_path, capsys):
    options = ["--loss", "TripletMarginLoss", "--loss-args", "swap=True", "--out", str(tmp_path / "run")]
    assert "IndexError" in refused(capsys, [*SMALL, "--dry-run", *options])
