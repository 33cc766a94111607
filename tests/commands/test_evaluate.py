"""The command evaluate: columns of its table, help and refusals."""

import json
import re

import pytest
import torch

from selfsup_xbn.cli import main
from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.config.schema import resolved
from selfsup_xbn.models.encoder import build_encoder
from tests.command_line import refused


@pytest.fixture
def weights(tmp_path):
    """Return a file with the state dict of a backbone for digits."""
    encoder = build_encoder("convnet-digits", 16, channels=1, image_size=8)
    torch.save(encoder.backbone.state_dict(), tmp_path / "backbone.pt")
    return tmp_path / "backbone.pt"


def help_of(capsys, *command):
    """Return the help text of a command, on one line."""
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize(("kind", "column"), [("knn", "k-NN, backbone"), ("retrieval", "Recall@1")])
def test_no_column_names_a_head_that_was_not_loaded(weights, capsys, kind, column):
    argv = ["evaluate", kind, "--weights", str(weights), "--backbone", "convnet-digits", "--data", "digits"]
    assert main([*argv, "--limit-train", "50", "--limit-test", "50"]) == 0
    (header,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("percent")]
    assert re.split(r"\s{2,}", header)[1] == column
    assert "projection" not in header


def test_a_run_has_a_column_for_head_and_backbone(finished_run, capsys):
    assert main(["evaluate", "knn", "--run", str(finished_run), "--only", "trained"]) == 0
    (header,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("percent")]
    assert re.split(r"\s{2,}", header)[1:] == ["k-NN, projection", "k-NN, backbone"]


def test_help_names_the_defaults_with_a_run(capsys):
    text = help_of(capsys, "evaluate", "knn")
    assert "number of neighbors (default: 200; with --run, that of the run)" in text
    assert "list:FILE.csv (with --run: that of the run; required with --weights)" in text
    assert "--backbone NAME architecture of the backbone (required with --weights)" in text


@pytest.mark.parametrize(
    ("given", "absent"),
    [
        (["--backbone", "resnet18"], "--data SPEC"),
        (["--data", "digits"], "--backbone NAME"),
        ([], "--backbone NAME and --data SPEC"),
    ],
)
def test_only_the_missing_options_are_named(capsys, given, absent):
    message = refused(capsys, ["evaluate", "knn", "--weights", "x.pt", *given])
    assert message == f"error: --weights: expected {absent} too, got none\n"


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("pretrain", "pretrain keeps none without validation images"),
        ("supervise", "supervise writes it after the first evaluation"),
    ],
)
@pytest.mark.parametrize("command", [["evaluate", "knn", "--run"], ["export", "--format", "safetensors"]])
def test_a_missing_best_model_is_explained(finished_run, capsys, mode, reason, command):
    if mode == "supervise":
        (finished_run / "config.json").write_text(json.dumps(resolved(SuperviseConfig())))
    message = refused(capsys, [*command, str(finished_run), "--best"])
    assert message == f"error: {finished_run} has no best.pt: {reason}; omit --best\n"
