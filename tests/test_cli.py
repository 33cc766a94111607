"""The command line: every fault is one line with exit code 2, nothing is written, help is quick."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup_xbn.cli import main
from selfsup_xbn.runs import checkpoint

SMALL = ["--limit-train", "128", "--batch-size", "64", "--queue-size", "64", "--epochs", "1"]


def tree(root, classes=("a", "b"), images=3):
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(images):
                pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def refused(capsys, argv):
    """The one line that a refused command prints."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    return err


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["pretrain", "--bach-size", "3"], ["--bach-size", "did you mean --batch-size"]),
        (["pretrain", "--epochs", "many"], ["--epochs", "many"]),
        (["pretrain", "--epochs"], ["--epochs"]),
        (["pretrain", "--adaptation", "xbl"], ["xbl", "xbm, xbn, axbn"]),
        (["pretrain", "extra"], ["extra"]),
        (["pretrane"], ["pretrane"]),
        (["pretrain", "--recipe", "cifar10-fig3"], ["cifar10-fig3", "did you mean cifar10-fig2"]),
        (["pretrain", "--data", "cifar11"], ["cifar11", "cifar10"]),
        (["pretrain", "--data", "folder:/no/such/place"], ["/no/such/place"]),
        (["pretrain", "--backbone", "resnet19"], ["resnet19", "resnet18"]),
        (["pretrain", "--head", "lineer"], ["lineer", "linear"]),
        (["pretrain", "--batch-size", "9999"], ["9999", "1437"]),
        (["pretrain", "--queue-size", "5000"], ["5000", "1437"]),
        (["pretrain", "--device", "cuda:77"], ["cuda:77"]),
        (["pretrain", "--device", "tpu9"], ["tpu9", "cpu"]),
        (["pretrain", "--weights", "/no/such.pt"], ["/no/such.pt"]),
        (["pretrain", "--momentum", "1.5"], ["--momentum", "at most 1", "1.5"]),
        (["pretrain", "--seed", str(2**70)], ["--seed", str(2**70)]),
        (["pretrain", "--dim", "1000000000000"], ["--dim", "1000000000000"]),
        (["pretrain", "--out", "/dev/null/x"], ["/dev/null/x"]),
        (["pretrain", "--out", "x" * 300], ["xxx"]),
        (["pretrain", "--resume", "--overwrite"], ["--resume", "--overwrite"]),
        (["evaluate", "knn"], ["--run", "--weights"]),
        (["evaluate", "knn", "--run", "/no/such/run"], ["/no/such/run"]),
        (["evaluate", "knn", "--weights", "x.pt"], ["--backbone"]),
        (["evaluate", "knn", "--weights", "/no/x.pt", "--backbone", "resnet18", "--data", "digits"], ["/no/x.pt"]),
    ],
)
def test_faults_are_one_line_that_names_the_value_and_the_cure(tmp_path, capsys, argv, parts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, argv)
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["empty class", "no test", "unreadable"])
def test_faults_of_an_image_folder_name_the_place(tmp_path, capsys, fault):
    root = tree(tmp_path / "photos")
    broken = {
        "empty class": root / "train" / "c",
        "no test": root / "test",
        "unreadable": root / "train" / "a" / "0.png",
    }[fault]
    if fault == "empty class":
        broken.mkdir()
    elif fault == "no test":
        broken.rename(tmp_path / "elsewhere")
    else:
        broken.write_bytes(b"no image")
    argv = [
        "pretrain",
        "--data",
        f"folder:{root}",
        "--batch-size",
        "2",
        "--queue-size",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    assert str(broken) in refused(capsys, argv)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_kept_unless_told_otherwise(tmp_path, capsys):
    argv = ["pretrain", *SMALL, "--out", str(tmp_path)]
    assert main(argv) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    message = refused(capsys, argv)
    assert "--resume" in message
    assert "--overwrite" in message
    message = refused(capsys, [*argv, "--resume", "--seed", "4"])
    assert "seed" in message
    refused(capsys, [*argv, "--overwrite", "--data", "cifar11"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main([*argv, "--overwrite", "--seed", "4"]) == 0
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 4


@pytest.mark.parametrize(
    "options",
    [["--data", "folder:PHOTOS"], ["--momentum", "2"], ["--data", "cifar11"], ["--image-size", "2"], ["--epochs", "0"]],
)
def test_overwrite_removes_nothing_before_the_new_run_can_begin(tmp_path, capsys, options):
    run = ["pretrain", *SMALL, "--out", str(tmp_path / "run")]
    assert main(run) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    tree(tmp_path / "photos", classes=("a", "b"), images=1)
    for index, name in enumerate(("a", "b")):  # test classes that no training class is among, one image in all
        (tmp_path / "photos" / "test" / name).rename(tmp_path / "photos" / "test" / f"other{index}")
    capsys.readouterr()
    options = [option.replace("PHOTOS", str(tmp_path / "photos")) for option in options]
    supervise = ["supervise", "--batch-size", "2", "--images-per-class", "1", "--queue-size", "2", "--workers", "0"]
    argv = [*supervise, "--out", str(tmp_path / "run")] if "folder" in options[1] else run
    refused(capsys, [*argv, "--overwrite", *options])
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("damage", ["removed", "cut", "not text"])
def test_metrics_that_are_not_those_of_the_checkpoint_are_named(tmp_path, capsys, damage):
    argv = ["pretrain", *SMALL, "--out", str(tmp_path)]
    assert main(argv) == 0
    metrics = tmp_path / "metrics.jsonl"
    content = metrics.read_bytes()
    if damage == "removed":
        metrics.unlink()
    else:
        metrics.write_bytes(content[:40] if damage == "cut" else b"\xff" * len(content))
    capsys.readouterr()
    assert "metrics.jsonl" in refused(capsys, [*argv, "--resume"])


def test_files_of_something_else_are_not_taken_for_a_run(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"precious")
    assert "checkpoint.pt" in refused(capsys, ["pretrain", *SMALL, "--out", str(tmp_path)])
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"precious"


def test_what_is_not_a_number_is_null_in_the_log(tmp_path):
    assert main(["pretrain", *SMALL, "--dim", "1", "--drift-every", "1", "--out", str(tmp_path)]) == 0
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_that_explodes_has_diverged(tmp_path, capsys):
    assert main(["pretrain", *SMALL, "--lr", "1e10", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith("diverged: ")


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut short", b"not a checkpoint at all"])
def test_a_damaged_checkpoint_is_named(tmp_path, capsys, damage):
    assert main(["pretrain", *SMALL, "--out", str(tmp_path)]) == 0
    (tmp_path / "checkpoint.pt").write_bytes(damage)
    capsys.readouterr()
    assert "checkpoint.pt" in refused(capsys, ["pretrain", "--resume", "--out", str(tmp_path)])
    assert "checkpoint.pt" in refused(capsys, ["evaluate", "knn", "--run", str(tmp_path)])


def test_a_checkpoint_of_another_program_is_refused(tmp_path, capsys):
    assert main(["pretrain", *SMALL, "--out", str(tmp_path)]) == 0
    torch.save({"state_dict": {}}, tmp_path / "checkpoint.pt")
    capsys.readouterr()
    assert "none of this program's" in refused(capsys, ["pretrain", "--resume", "--out", str(tmp_path)])
    checkpoint.save({"state_dict": {}}, tmp_path)
    assert "no checkpoint of this program" in refused(capsys, ["pretrain", "--resume", "--out", str(tmp_path)])


def test_dry_run_prints_settings_and_cost_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--recipe", "cifar10-fig2", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert '"queue_size": "4096"' in printed
    assert "78,000 in all" in printed  # 200 epochs of 390 steps
    assert "11,234,112" not in printed or "parameters" in printed
    assert "2.0 MiB" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["pretrain"],
        ["supervise"],
        ["evaluate"],
        ["evaluate", "knn"],
        ["evaluate", "retrieval"],
        ["report"],
        ["export"],
    ],
    ids=" ".join,
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: selfsup-xbn", *command]))


def test_help_answers_without_torch():
    code = """import sys
from selfsup_xbn.cli import main
try:
    main(["pretrain", "--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--queue-size" in printed
    assert "--adaptation" in printed


def test_an_encoder_from_elsewhere_is_evaluated_and_what_fitted_is_said(tmp_path, capsys):
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pt")
    root = tree(tmp_path / "photos")
    argv = [
        "evaluate",
        "knn",
        "--weights",
        str(tmp_path / "resnet18.pt"),
        "--backbone",
        "resnet18",
        "--data",
        f"folder:{root}",
    ]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "fc.weight" in printed
    assert "trained encoder" in printed
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    argv[3] = str(tmp_path / "other.pt")
    assert "other.pt" in refused(capsys, argv)
