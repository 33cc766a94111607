"""Files of a run that were changed, deleted, planted as links or made FIFOs."""

from __future__ import annotations

import json
import os
import shutil
import zipfile

import pytest
import torch

from selfsup_xbn.cli import main
from selfsup_xbn.report.curves import draw_curves
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics
from tests.command_line import refused
from tests.robustness.bad_input import time_limit


def flip(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


@pytest.mark.parametrize("command", ["resume", "report", "export"])
def test_flipped_bits_of_the_log_are_detected(finished_run, tmp_path, capsys, command):
    log = finished_run / "metrics.jsonl"
    content = log.read_bytes()
    commands = {
        "resume": ["pretrain", "--resume", "--epochs", "1", "--out", str(finished_run)],
        "report": ["report", str(finished_run), "--out", str(tmp_path / "page")],
        "export": ["export", str(finished_run), "--format", "csv", "--overwrite"],
    }
    digits = [place for place, byte in enumerate(content) if 48 <= byte < 58]
    for place in (digits[5], digits[-5], len(content) - 1):
        log.write_bytes(flip(content, place, 0))
        assert "metrics.jsonl" in refused(capsys, commands[command])
    log.write_bytes(content)
    assert main(commands[command]) == 0


def test_records_after_the_checkpoint_are_read_and_not_covered(finished_run):
    with open(finished_run / "metrics.jsonl", "a") as log:
        log.write('{"epoch": 9}\n')
    assert read_metrics(finished_run)[-1] == {"epoch": 9}


def test_log_of_a_checkpoint_without_its_checksum_is_read(finished_run):
    state = checkpoint.load(finished_run)
    del state["log_sha256"]
    checkpoint.save(state, finished_run)
    (finished_run / "metrics.jsonl").write_text('{"epoch": 3}\n')
    assert read_metrics(finished_run) == [{"epoch": 3}]


def test_changed_config_is_said(finished_run, capsys):
    config = json.loads((finished_run / "config.json").read_text())
    (finished_run / "config.json").write_text(json.dumps(config | {"lr": 0.5}))
    assert main(["evaluate", "knn", "--run", str(finished_run)]) == 0
    assert "config.json was changed after the training (--lr: " in capsys.readouterr().err


def test_deleted_config_beside_a_checkpoint_is_called_missing(finished_run, capsys):
    (finished_run / "config.json").unlink()
    for command in (
        ["pretrain", "--out", str(finished_run)],
        ["pretrain", "--resume", "--out", str(finished_run)],
        ["evaluate", "knn", "--run", str(finished_run)],
        ["export", str(finished_run), "--format", "csv"],
        ["report", str(finished_run), "--out", str(finished_run / "page")],
    ):
        assert "has a checkpoint, but its config.json is missing" in refused(capsys, command)


@pytest.mark.parametrize("name", ["curves.png", "curves.png.tmp", "checkpoint.pt.tmp"])
def test_planted_link_is_not_written_through(finished_run, tmp_path, name):
    (tmp_path / "victim").write_text("precious")
    (finished_run / name).unlink(missing_ok=True)
    (finished_run / name).symlink_to(tmp_path / "victim")
    draw_curves(finished_run)
    checkpoint.save(checkpoint.load(finished_run), finished_run)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (finished_run / name).is_symlink()


def test_log_that_is_a_link_is_not_written_through(finished_run, tmp_path, capsys):
    shutil.copy(finished_run / "metrics.jsonl", tmp_path / "victim")
    (finished_run / "metrics.jsonl").unlink()
    (finished_run / "metrics.jsonl").symlink_to(tmp_path / "victim")
    before = (tmp_path / "victim").read_bytes()
    assert "cannot write" in refused(capsys, ["pretrain", "--resume", "--out", str(finished_run)])
    assert (tmp_path / "victim").read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoint.pt"])
def test_fifo_in_a_run_folder_is_named(finished_run, capsys, name):
    for path in (finished_run / name, finished_run / "checkpoint-1.pt"):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    with time_limit(20):
        message = refused(capsys, ["pretrain", "--resume", "--out", str(finished_run)])
    assert name in message or "checkpoint-1.pt" in message


def test_compressed_checkpoint_is_refused_before_it_unpacks(tmp_path, capsys):
    torch.save({"state_dict": {"0.0.weight": torch.zeros(10**6)}}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
    assert (tmp_path / "bomb.pt").stat().st_size < 10**5
    command = ["evaluate", "knn", "--backbone", "convnet-digits", "--data", "digits", "--weights"]
    assert "is no checkpoint" in refused(capsys, [*command, str(tmp_path / "bomb.pt")])
