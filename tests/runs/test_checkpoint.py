"""Checkpoints: complete or absent, damage detected, the one before used, temporary files removed."""

import contextlib
import os
import random
import re
import warnings
import zipfile

import pytest
import torch

from selfsup_xbn.cli import main
from selfsup_xbn.errors import UserError
from selfsup_xbn.runs import checkpoint
from tests.command_line import SMALL, contents, refused
from tests.robustness import faults

STATE = {"method": {"w": torch.arange(300.0)}, "config": {"mode": "pretrain"}, "epoch": 1}


def saved(folder, *epochs, keep=2):
    """Save checkpoints of these epochs, one after the other; return the newest one's path."""
    for epoch in epochs:
        checkpoint.save(STATE | {"epoch": epoch}, folder, keep=keep)
    return folder / checkpoint.NAME


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_last_checkpoints_are_kept_newest_first(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=3)
    assert names(tmp_path) == ["checkpoint-1.pt", "checkpoint-2.pt", "checkpoint.pt"]
    kept = [torch.load(tmp_path / name)["epoch"] for name in ("checkpoint.pt", "checkpoint-1.pt", "checkpoint-2.pt")]
    assert kept == [4, 3, 2]
    saved(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["checkpoint.pt"]


def test_torch_and_zip_read_checkpoints(tmp_path):
    path = saved(tmp_path, 1)
    assert torch.equal(torch.load(path, weights_only=True)["method"]["w"], STATE["method"]["w"])
    assert torch.equal(torch.load(path, weights_only=True, mmap=True)["method"]["w"], STATE["method"]["w"])
    assert zipfile.ZipFile(path).testzip() is None


def test_every_flipped_bit_and_every_cut_is_detected(tmp_path):
    path = saved(tmp_path, 1)
    content, rng = path.read_bytes(), random.Random(0)
    assert checkpoint.is_intact(path)
    places = [*range(40), *range(len(content) - 120, len(content)), *(rng.randrange(len(content)) for _ in range(300))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert not checkpoint.is_intact(path), place
        path.write_bytes(content[:place])
        assert not checkpoint.is_intact(path), place
    path.write_bytes(content + b"\0")
    assert not checkpoint.is_intact(path)


def test_torch_itself_does_not_detect_a_flipped_bit(tmp_path):
    """The reason for our checksum; if this fails, torch has started to verify its archives."""
    path = saved(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[content.index(STATE["method"]["w"][200:].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["method"]["w"], STATE["method"]["w"])


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped"])
def test_damaged_newest_checkpoint_is_named_and_skipped(tmp_path, how):
    path = saved(tmp_path, 1, 2)
    path.write_bytes(faults.damage(path.read_bytes(), how, random.Random(1))[0])
    with pytest.warns(
        UserWarning, match=rf"^{re.escape(str(path))} is damaged .*using checkpoint-1.pt instead$"
    ) as caught:
        assert checkpoint.load(tmp_path)["epoch"] == 1
    assert len(caught) == 1
    checkpoint.rename_damaged(tmp_path)
    saved(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-1.pt", "checkpoint.pt", "checkpoint.pt.damaged"]
    assert [torch.load(tmp_path / name)["epoch"] for name in names(tmp_path)[:2]] == [1, 3]


def test_missing_newest_checkpoint_is_no_loss(tmp_path):
    path = saved(tmp_path, 1, 2)
    path.unlink()  # killed between two renames
    with warnings.catch_warnings(action="error"):
        assert checkpoint.load(tmp_path)["epoch"] == 1


def test_no_usable_checkpoint_is_an_error(tmp_path):
    (tmp_path / "checkpoint-1.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint-1.pt is damaged .*--overwrite$"):
        checkpoint.load(tmp_path)
    (tmp_path / "checkpoint-1.pt").unlink()
    assert not checkpoint.exists(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint \S*checkpoint.pt"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace", "unlink", "open"])
def test_stop_at_any_system_call_leaves_a_good_checkpoint(tmp_path, monkeypatch, call):
    class Stopped(BaseException):
        pass

    original, state = getattr(os, call), {"left": 0, "stopped": 0}

    def stopping(*args, **kwargs):
        if not state["left"]:
            state["stopped"] += 1
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
        assert checkpoint.load(tmp_path)["epoch"] in (3, *range(10, 11 + left))
    assert state["stopped"] > 0


def test_resuming_removes_stale_temporary_files(finished_run):
    before = names(finished_run)
    for name in ("checkpoint.pt.tmp", "best.pt.tmp", "config.json.tmp", "mine.tmp"):
        (finished_run / name).write_bytes(b"half")
    assert main(["pretrain", "--resume", "--out", str(finished_run)]) == 0
    assert names(finished_run) == sorted([*before, "mine.tmp"])


def test_run_with_damaged_checkpoints_only_is_refused(finished_run, capsys):
    for name in ("checkpoint.pt", "checkpoint-1.pt"):
        (finished_run / name).write_bytes(b"PK")
    before = contents(finished_run)
    message = refused(capsys, ["pretrain", "--resume", "--out", str(finished_run)])
    assert re.fullmatch(r"error: \S*checkpoint.pt is damaged or not a checkpoint .*\n", message)
    assert contents(finished_run) == before


def test_minutes_save_in_each_step_and_the_end_is_saved(tmp_path):
    def saved_positions(folder):
        states = [checkpoint.load(folder, path.name) for path in folder.glob("checkpoint*.pt")]
        return sorted((state["epoch"], state["step"]) for state in states)

    epochs = ["--epochs", "2", "--eval-every", "0", "--keep", "9"]
    assert main([*SMALL, *epochs, "--save-every", "0.0000001m", "--out", str(tmp_path / "often")]) == 0
    assert saved_positions(tmp_path / "often") == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 0)]
    assert main([*SMALL, *epochs, "--save-every", "60m", "--out", str(tmp_path / "seldom")]) == 0
    assert saved_positions(tmp_path / "seldom") == [(2, 0)]
