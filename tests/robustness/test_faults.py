"""Faults of the machine: kills, damaged checkpoints, full disks. The whole campaign is ``experiments/faults.py``."""

import contextlib
import os
import random
import re
import signal
import warnings
import zipfile
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from experiments import faults, killed_runs
from selfsup_xbn.cli import main
from selfsup_xbn.config.parsing import parse_save_interval
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.collapse import collapse_warning, embedding_std
from selfsup_xbn.evaluation.drift import FeatureDrift
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.training import trainer as train
from selfsup_xbn.training.signals import stop_signals
from selfsup_xbn.utils import atomic

STATE = {"method": {"w": torch.arange(300.0)}, "config": {"mode": "pretrain"}, "epoch": 1}
SMALL = ["pretrain", "--limit-train", "128", "--batch-size", "64", "--queue-size", "64", "--drift-every", "0"]


def saved(folder, *epochs, keep=2):
    """Checkpoints of these epochs, one after the other."""
    for epoch in epochs:
        checkpoint.save(STATE | {"epoch": epoch}, folder, keep=keep)
    return folder / checkpoint.NAME


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_runs_that_are_killed_or_damaged_or_without_space_end_as_the_one_that_was_not(tmp_path, unchecked):
    names = ["supervise axbn", "pretrain xbn, 2 workers", "supervise none"]
    cases = faults.campaign(tmp_path, seed=0, kills=5, damaged=1, full=1, names=names)
    assert len(cases) == 7
    assert [case for case in cases if not case["equal"]] == []


def test_the_campaign_tells_runs_apart(tmp_path):
    argv = [*killed_runs.cells(tmp_path)["supervise xbn"], "--epochs", "1", "--eval-every", "0"]
    for name, options in {"a": [], "b": [], "c": ["--seed", "1"], "d": ["--lr", "0.0011"]}.items():
        assert killed_runs.run([*argv, *options], tmp_path / name).code == 0
    assert killed_runs.differences(tmp_path / "a", tmp_path / "b") == []
    for other in "cd":
        found = killed_runs.differences(tmp_path / "a", tmp_path / other)
        assert {"metrics", "checkpoint.pt: .method.queue.rows", "checkpoint.pt: .epoch"} & set(found) >= {"metrics"}
        assert any("encoder.backbone" in name for name in found)


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_the_last_checkpoints_are_kept_the_newest_first(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=3)
    assert names(tmp_path) == ["checkpoint-1.pt", "checkpoint-2.pt", "checkpoint.pt"]
    kept = [torch.load(tmp_path / name)["epoch"] for name in ("checkpoint.pt", "checkpoint-1.pt", "checkpoint-2.pt")]
    assert kept == [4, 3, 2]
    saved(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["checkpoint.pt"]


def test_other_programs_read_checkpoints_by_torch_and_zip(tmp_path):
    path = saved(tmp_path, 1)
    assert torch.equal(torch.load(path, weights_only=True)["method"]["w"], STATE["method"]["w"])
    assert torch.equal(torch.load(path, weights_only=True, mmap=True)["method"]["w"], STATE["method"]["w"])
    assert zipfile.ZipFile(path).testzip() is None


def test_every_flipped_bit_and_every_cut_is_recognised(tmp_path):
    path = saved(tmp_path, 1)
    content, rng = path.read_bytes(), random.Random(0)
    assert checkpoint.is_whole(path)
    places = [*range(40), *range(len(content) - 120, len(content)), *(rng.randrange(len(content)) for _ in range(300))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert not checkpoint.is_whole(path), place
        path.write_bytes(content[:place])
        assert not checkpoint.is_whole(path), place
    path.write_bytes(content + b"\0")
    assert not checkpoint.is_whole(path)


def test_torch_itself_does_not_notice_a_flipped_bit(tmp_path):
    """The reason for a checksum of our own; if this fails, torch has learned to look."""
    path = saved(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[content.index(STATE["method"]["w"][200:].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["method"]["w"], STATE["method"]["w"])


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, how):
    path = saved(tmp_path, 1, 2)
    path.write_bytes(faults.damage(path.read_bytes(), how, random.Random(1))[0])
    with pytest.warns(UserWarning, match=rf"^{re.escape(str(path))} is damaged .*: checkpoint-1.pt is used") as said:
        assert checkpoint.load(tmp_path)["epoch"] == 1
    assert len(said) == 1
    checkpoint.set_damaged_aside(tmp_path)
    saved(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-1.pt", "checkpoint.pt", "checkpoint.pt.damaged"]
    assert [torch.load(tmp_path / name)["epoch"] for name in names(tmp_path)[:2]] == [1, 3]


def test_a_missing_newest_checkpoint_is_no_loss_and_none_at_all_is_said(tmp_path):
    path = saved(tmp_path, 1, 2)
    path.unlink()  # killed between two renames
    with warnings.catch_warnings(action="error"):
        assert checkpoint.load(tmp_path)["epoch"] == 1
    (tmp_path / "checkpoint-1.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint-1.pt is damaged, .* no whole one is beside it.*--overwrite$"):
        checkpoint.load(tmp_path)
    (tmp_path / "checkpoint-1.pt").unlink()
    assert not checkpoint.exists(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint \S*checkpoint.pt"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace", "unlink", "open"])
def test_a_process_that_stops_at_any_call_of_the_file_system_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call):
    class Stopped(BaseException):
        pass

    original, state = getattr(os, call), {"left": 0}

    def stopping(*args, **kwargs):
        if not state["left"]:
            raise Stopped
        state["left"] -= 1
        return original(*args, **kwargs)

    saved(tmp_path, 1, 2, 3, keep=3)
    for left in range(6):
        state["left"] = left
        with monkeypatch.context() as patch:
            patch.setattr(os, call, stopping)
            with contextlib.suppress(Stopped):
                saved(tmp_path, 10 + left, keep=2)
        found = checkpoint.load(tmp_path)["epoch"]
        assert found in (3, *range(10, 11 + left))


def test_stale_temporary_files_go_when_the_run_goes_on(tmp_path):
    assert main([*SMALL, "--epochs", "1", "--out", str(tmp_path)]) == 0
    before = names(tmp_path)
    for name in ("checkpoint.pt.tmp", "best.pt.tmp", "config.json.tmp", "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    assert main(["pretrain", "--resume", "--out", str(tmp_path)]) == 0
    assert names(tmp_path) == sorted([*before, "mine.tmp"])


def test_a_run_with_damaged_checkpoints_only_is_refused_in_one_line_and_nothing_changes(tmp_path, capsys):
    assert main([*SMALL, "--epochs", "2", "--out", str(tmp_path)]) == 0
    for name in ("checkpoint.pt", "checkpoint-1.pt"):
        (tmp_path / name).write_bytes(b"PK")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(["pretrain", "--resume", "--out", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: \S*checkpoint.pt is damaged, .*\n", capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------------------------- save-every


def test_save_every_is_epochs_or_minutes():
    assert parse_save_interval("3") == (3, 0.0)
    assert parse_save_interval("10m") == (0, 600.0)
    assert parse_save_interval("0.5m") == (0, 30.0)
    for text in ("0", "-1", "1.5", "m", "0m", "-2m", "nanm", "infm", "1e999m", "10 minutes", "", "1h", "9" * 5000):
        with pytest.raises(UserError, match=r"^--save-every: expected epochs from 1 on, or minutes such as 10m, got '"):
            parse_save_interval(text)


def test_minutes_are_looked_at_in_each_step_and_the_end_is_saved_at_all_events(tmp_path, monkeypatch):
    positions = []
    monkeypatch.setattr(train, "_save", lambda run, log: positions.append((run.epoch, run.step)))
    epochs = ["--epochs", "2", "--eval-every", "0"]
    assert main([*SMALL, *epochs, "--save-every", "0.0000001m", "--out", str(tmp_path / "often")]) == 0
    assert positions == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 0)]
    positions.clear()
    assert main([*SMALL, *epochs, "--save-every", "60m", "--out", str(tmp_path / "seldom")]) == 0
    assert positions == [(2, 0)]


# -------------------------------------------------------------------------------------------------------- full disk


def test_a_picture_that_cannot_be_written_does_not_lose_the_run(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfsup_xbn.commands.train.draw_curves", full)
    assert main([*SMALL, "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert checkpoint.load(tmp_path)["epoch"] == 1
    printed = capsys.readouterr()
    assert "trained encoder" in printed.out
    assert f"warning: a picture could not be drawn in {tmp_path} (No space left on device)\n" in printed.err


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "config.json").write_text("old")

    def fill_the_disk():
        with atomic.replacing(tmp_path / "config.json") as file:
            file.write(b"ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"^cannot write \S*config.json \(No space left on device\): .*--resume$"):
        fill_the_disk()
    assert (tmp_path / "config.json").read_text() == "old"
    assert names(tmp_path) == ["config.json"]


# --------------------------------------------------------------------------------------------------------- collapse


def test_a_collapsed_embedding_is_warned_of_once_an_epoch_and_logged(tmp_path, capsys, monkeypatch):
    step = train.Run.train_step

    def collapse(run, batch):
        step(run, batch)
        last = list(run.method.encoder_q.head.parameters())
        last[0].data.mul_(1e-6)
        last[-1].data.fill_(1.0)

    monkeypatch.setattr(train.Run, "train_step", collapse)
    assert main([*SMALL, "--epochs", "2", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert (
        len(
            re.findall(
                r"warning: epoch [12]: the embedding has collapsed: its standard deviation over a batch is \d", said
            )
        )
        == 2
    )
    found = [record["embedding_std"] for record in read_metrics(tmp_path)[1:]]
    assert len(found) == 2
    assert all(value < 1e-4 for value in found)


def test_a_healthy_embedding_is_not_warned_of(tmp_path, capsys):
    assert main([*SMALL, "--epochs", "2", "--out", str(tmp_path)]) == 0
    assert "collapsed" not in capsys.readouterr().err
    assert 0.01 < read_metrics(tmp_path)[-1]["embedding_std"] < 128**-0.5


def test_the_deviation_is_that_of_unit_rows_and_the_limit_a_hundredth_of_a_spheres():
    images = torch.randn(1000, 64, 1, 1)
    drift = FeatureDrift(lambda x: 7 * x.flatten(1), images)
    found = embedding_std(drift.embeddings()).item()
    unit = images.flatten(1).numpy() / np.linalg.norm(images.flatten(1).numpy(), axis=1, keepdims=True)
    assert found == pytest.approx(unit.std(0, ddof=1).mean(), rel=1e-5)
    assert found == pytest.approx(1 / 8, rel=0.02)
    assert collapse_warning(0.00126, 64) == ""
    assert "0.0012," in collapse_warning(0.0012, 64)


# ------------------------------------------------------------------------------------------------------- preemption


def test_a_second_signal_ends_the_process_at_once():
    def asked_twice():
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)

    process = get_context("fork").Process(target=asked_twice)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGTERM
