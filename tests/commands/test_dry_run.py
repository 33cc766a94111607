"""The dry run: the facts that it prints, and what it refuses as the run does."""

import json
import re

import pytest
import torch

from selfsup_xbn.cli import main
from selfsup_xbn.training import preflight
from tests.command_line import PRETRAIN, refused


@pytest.mark.parametrize("mode", ["pretrain", "supervise"])
@pytest.mark.parametrize("present", ["", "cifar-10-batches-py", "cifar-10-python.tar.gz"])
def test_a_download_of_the_run_is_announced(tmp_path, capsys, monkeypatch, mode, present):
    monkeypatch.chdir(tmp_path)
    if present:
        (tmp_path / "data" / present).mkdir(parents=True)
    assert main([mode, "--data", "cifar10", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert ("cifar10 is not in data/cifar-10-batches-py: the run downloads it" in printed) == (not present)


def test_a_data_set_with_a_path_is_not_downloaded_by_the_dry_run(tmp_path, capsys):
    assert main(["pretrain", "--data", f"cifar100:{tmp_path}", "--dry-run"]) == 0
    assert f"cifar100 is not in {tmp_path}/cifar-100-python: the run downloads it" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_without_a_download_announces_none(tmp_path, capsys):
    assert main([*PRETRAIN, "--data-root", str(tmp_path), "--dry-run"]) == 0
    assert "downloads" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_the_machine_lacks_is_refused(capsys):
    assert "0 CUDA devices" in refused(capsys, [*PRETRAIN, "--device", "cuda", "--dry-run"])


def test_a_queue_that_does_not_fit_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 10**5)
    assert "cpu has 100,000 free" in refused(capsys, [*PRETRAIN, "--device", "cpu", "--dry-run"])


def test_the_facts_come_before_the_configuration(capsys):
    assert main([*PRETRAIN, "--queue-size", "24", "--epochs", "1", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(re.split(r" {2,}", line) for line in lines[: lines.index("{")] if line)
    assert list(facts)[-5:] == ["images", "steps", "parameters", "weights", "queue"]
    assert facts["images"].endswith("1 channel")
    assert facts["steps"].endswith("22 in total, 1 epoch")
    rows, moments = 24 * 128 * 4, 128 * 4 * 8
    size = float(re.fullmatch(r"24 rows of dimension 128, (\S+) KiB", facts["queue"])[1])
    assert 1024 * size == pytest.approx(rows + moments, rel=0.01)
    assert json.loads("\n".join(lines[lines.index("{") :]))["queue_size"] == "24"
