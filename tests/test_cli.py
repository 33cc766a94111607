"""The command line: errors are one line with exit code 2 and write nothing; help does not import torch."""

import json
import subprocess
import sys

import pytest
import torch

import selfsup_xbn
from selfsup_xbn.cli import main
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.models.encoder import build_encoder
from selfsup_xbn.runs import checkpoint
from tests.command_line import PRETRAIN, SMALL, SUPERVISE, contents, image_folder, refused


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
        (["supervise", "--recipe", "glyphs-moco"], ["'glyphs-moco', a recipe of pretrain"]),
        (["supervise", "--data", "folder", "--weights", "/no/such.pt"], ["--data folder", "write folder:PATH"]),
        (["supervise", "--data", "list:", "--dry-run"], ["--data list", "write list:FILE.csv"]),
        (["pretrain", "--data", "cifar11"], ["cifar11", "cifar10"]),
        (["pretrain", "--data", "folder:/no/such/place"], ["/no/such/place"]),
        ([*PRETRAIN, "--backbone", "resnet19"], ["resnet19", "resnet18"]),
        ([*PRETRAIN, "--head", "lineer"], ["lineer", "linear"]),
        ([*PRETRAIN, "--batch-size", "9999"], ["9999", "1437"]),
        ([*PRETRAIN, "--queue-size", "5000"], ["5000", "1437"]),
        ([*PRETRAIN, "--device", "cuda:77"], ["cuda:77"]),
        ([*PRETRAIN, "--device", "tpu9"], ["tpu9", "cpu"]),
        ([*PRETRAIN, "--weights", "/no/such.pt"], ["/no/such.pt"]),
        (["pretrain", "--momentum", "1.5"], ["--momentum", "at most 1", "1.5"]),
        (["pretrain", "--seed", str(2**70)], ["--seed", str(2**70)]),
        ([*PRETRAIN, "--dim", "1000000000000"], ["--dim", "1000000000000"]),
        ([*PRETRAIN, "--out", "/dev/null/x"], ["/dev/null/x"]),
        ([*PRETRAIN, "--out", "x" * 300], ["xxx"]),
        (["pretrain", "--resume", "--overwrite"], ["--resume", "--overwrite"]),
        (["evaluate", "knn"], ["--run", "--weights"]),
        (["evaluate", "knn", "--run", "/no/such/run"], ["/no/such/run"]),
        (["evaluate", "knn", "--weights", "x.pt"], ["--backbone"]),
        (["evaluate", "knn", "--weights", "/no/x.pt", "--backbone", "resnet18", "--data", "digits"], ["/no/x.pt"]),
    ],
)
def test_error_is_one_line_with_value_and_remedy(tmp_path, capsys, argv, parts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, argv)
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["empty class", "no train", "unreadable"])
def test_error_in_an_image_folder_names_the_place(tmp_path, capsys, fault):
    root = image_folder(tmp_path / "photos")
    broken = {
        "empty class": root / "train" / "c",
        "no train": root / "train",
        "unreadable": root / "train" / "a" / "0.png",
    }[fault]
    if fault == "empty class":
        broken.mkdir()
    elif fault == "no train":
        broken.rename(tmp_path / "elsewhere")
    else:
        broken.write_bytes(b"no image")
    argv = [*PRETRAIN, "--data", f"folder:{root}", "--batch-size", "2", "--queue-size", "2"]
    place = root if fault == "no train" else broken
    assert str(place) in refused(capsys, [*argv, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["report"], ["evaluate", "knn", "--run"], ["export", "--format", "csv"]])
def test_a_folder_of_runs_is_answered_with_its_runs(finished_run, capsys, command):
    message = refused(capsys, [*command, str(finished_run.parent)])
    assert f"there are runs in {finished_run.parent}/*, such as {finished_run}" in message


@pytest.mark.parametrize(
    "command", [PRETRAIN, [*SUPERVISE, "--workers", "0"], ["compare", *PRETRAIN], ["report", "RUN"], ["export", "RUN"]]
)
def test_an_output_folder_is_tried_before_the_work(finished_run, capsys, monkeypatch, command):
    for work in ("training.run.baselines", "commands.compare.cost_lines", "report.page.load_run"):
        monkeypatch.setattr(f"selfsup_xbn.{work}", None)
    argv = [word.replace("RUN", str(finished_run)) for word in command]
    if command[0] == "export":
        argv += ["--format", "csv"]
    assert "cannot write /proc/x" in refused(capsys, [*argv, "--out", "/proc/x/y"])


def test_existing_run_is_kept_without_overwrite(finished_run, capsys):
    argv = [*SMALL, "--out", str(finished_run)]
    before = contents(finished_run)
    message = refused(capsys, argv)
    assert "--resume" in message
    assert "--overwrite" in message
    message = refused(capsys, [*argv, "--resume", "--seed", "4"])
    assert "seed" in message
    refused(capsys, [*argv, "--overwrite", "--data", "cifar11"])
    assert contents(finished_run) == before
    assert main([*argv, "--overwrite", "--seed", "4"]) == 0
    assert json.loads((finished_run / "config.json").read_text())["seed"] == 4


@pytest.mark.parametrize(
    "options",
    [["--data", "folder:PHOTOS"], ["--momentum", "2"], ["--data", "cifar11"], ["--image-size", "2"], ["--epochs", "0"]],
)
def test_overwrite_removes_nothing_if_the_new_run_is_refused(finished_run, tmp_path, capsys, options):
    before = contents(finished_run)
    image_folder(tmp_path / "photos", classes=("a", "b"), images=1)
    for index, name in enumerate(("a", "b")):  # disjoint test classes of one image, which retrieval cannot evaluate
        (tmp_path / "photos" / "test" / name).rename(tmp_path / "photos" / "test" / f"other{index}")
    options = [option.replace("PHOTOS", str(tmp_path / "photos")) for option in options]
    supervise = [*SUPERVISE, "--batch-size", "2", "--images-per-class", "1", "--queue-size", "2", "--workers", "0"]
    argv = supervise if "folder" in options[1] else SMALL
    refused(capsys, [*argv, "--out", str(finished_run), "--overwrite", *options])
    assert contents(finished_run) == before


@pytest.mark.parametrize("damage", ["removed", "cut", "not text"])
def test_metrics_that_do_not_fit_the_checkpoint_are_named(finished_run, capsys, damage):
    metrics = finished_run / "metrics.jsonl"
    content = metrics.read_bytes()
    if damage == "removed":
        metrics.unlink()
    else:
        metrics.write_bytes(content[:40] if damage == "cut" else b"\xff" * len(content))
    assert "metrics.jsonl" in refused(capsys, [*SMALL, "--out", str(finished_run), "--resume"])


def test_files_of_another_program_are_not_replaced(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"precious")
    assert "checkpoint.pt" in refused(capsys, [*SMALL, "--out", str(tmp_path)])
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"precious"


def test_nan_is_null_in_the_log(tmp_path, plots):
    assert main([*SMALL, "--dim", "1", "--drift-every", "1", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "null" in text
    assert "NaN" not in text


def test_exploding_run_ends_as_diverged(tmp_path, capsys):
    assert main([*SMALL, "--lr", "1e10", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith("diverged: ")


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut short", b"not a checkpoint at all"])
def test_damaged_checkpoint_is_named(finished_run, capsys, damage):
    (finished_run / "checkpoint.pt").write_bytes(damage)
    assert "checkpoint.pt" in refused(capsys, ["pretrain", "--resume", "--out", str(finished_run)])
    assert "checkpoint.pt" in refused(capsys, ["evaluate", "knn", "--run", str(finished_run)])


def test_checkpoint_of_another_program_is_refused(finished_run, capsys):
    torch.save({"state_dict": {}}, finished_run / "checkpoint.pt")
    assert "not a checkpoint of this program" in refused(capsys, ["pretrain", "--resume", "--out", str(finished_run)])
    checkpoint.save({"state_dict": {}}, finished_run)
    assert "not a checkpoint of this program" in refused(capsys, ["pretrain", "--resume", "--out", str(finished_run)])


def test_dry_run_prints_settings_and_cost_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--recipe", "cifar10-fig2", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert '"queue_size": "4096"' in printed
    assert "78,000 in total" in printed  # 200 epochs of 390 steps
    config = RECIPES["cifar10-fig2"]
    encoder = build_encoder(config.backbone, config.dim, head=config.head, bn_splits=config.bn_splits)
    assert f"{sum(parameter.numel() for parameter in encoder.parameters()):,} in the encoder" in printed
    assert "2.0 MiB" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["data", "weights", "sizes"])
def test_an_error_of_a_dry_run_comes_alone(tmp_path, capsys, fault):
    root = image_folder(tmp_path / "photos")
    options = ["--backbone", "convnet4", "--batch-size", "2"]
    if fault == "data":
        (root / "train" / "a" / "0.png").write_bytes(b"no image")
    elif fault == "weights":
        torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
        options += ["--weights", str(tmp_path / "other.pt")]
    else:
        options += ["--batch-size", "7"]  # of six images
    assert main(["pretrain", "--data", f"folder:{root}", *options, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    "command",
    [
        [],
        *map(
            str.split, ("pretrain", "supervise", "evaluate", "evaluate knn", "evaluate retrieval", "report", "export")
        ),
    ],
    ids=" ".join,
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: selfsup-xbn", *command]))


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"selfsup-xbn {selfsup_xbn.__version__}\n"


def test_help_does_not_import_torch():
    code = """import sys
from selfsup_xbn.cli import main
try:
    main(["pretrain", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--queue-size" in printed
    assert "--adaptation" in printed


@pytest.mark.slow
def test_encoder_from_a_file_is_evaluated(tmp_path, capsys):
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pt")
    root = image_folder(tmp_path / "photos")
    argv = ["evaluate", "knn", "--backbone", "resnet18", "--data", f"folder:{root}", "--weights"]
    assert main([*argv, str(tmp_path / "resnet18.pt")]) == 0
    printed = capsys.readouterr().out
    assert "fc.weight" in printed
    assert "trained encoder" in printed
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    assert "other.pt" in refused(capsys, [*argv, str(tmp_path / "other.pt")])
