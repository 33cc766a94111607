"""Several processes train as one; the first alone prints; a lost process ends the others."""

import json
import os
import re
import signal
import time

import pytest
import torch
from PIL import Image
from torch import nn

from selfsup_xbn.cli import main
from selfsup_xbn.errors import UserError
from selfsup_xbn.models.backbones import SMALL_BACKBONES
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.utils.distributed import shard_slice
from tests.command_line import contents, image_folder, interrupted_at
from tests.finished_runs import differences
from tests.processes import PATIENCE, launch, torchrun

SHORT = ["--backbone", "plain", "--epochs", "2", "--drift-every", "5", "--eval-every", "0", "--limit-test", "96"]
PRETRAIN = ["pretrain", "--recipe", "digits", "--limit-train", "227", "--batch-size", "22", "--queue-size", "100"]
PRETRAIN += [*SHORT, "--lr", "0.01"]
SUPERVISE = ["supervise", "--recipe", "digits-disjoint", "--limit-train", "181", "--batch-size", "18"]
SUPERVISE += [*SHORT, "--images-per-class", "6", "--queue-size", "90"]
RUNS = {
    "pretrain xbn": PRETRAIN,
    "supervise xbm* after a head epoch": [
        *SUPERVISE,
        *("--adaptation", "xbm", "--batch-loss-weight", "1", "--head-epochs", "1", "--head-lr", "0.01"),
    ],
    "pretrain xbn, queue sharded": [*PRETRAIN, "--shard-queue", "--symmetric", "--queue-size", "180"],
    "supervise axbn, queue sharded": [*SUPERVISE, "--shard-queue", "--adaptation", "axbn"],
    "pretrain xbn, two micro-batches": [*PRETRAIN, "--accumulate", "2"],
    "supervise xbn, two micro-batches": [*SUPERVISE, "--accumulate", "2", "--batch-size", "24", "--epochs", "3"],
    "supervise without memory": [*SUPERVISE, "--queue-size", "0"],
}


@pytest.fixture(autouse=True)
def plain(monkeypatch, unchecked):
    """A backbone without BatchNorm, in which each row depends on itself alone."""

    def layers(channels):
        return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 64), nn.GELU(), nn.Linear(64, 32))

    monkeypatch.setitem(SMALL_BACKBONES, "plain", layers)


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_run(a, b):
    """State, and every number of the log but the times."""
    assert_close(checkpoint.load(a)["method"], checkpoint.load(b)["method"])
    for one, two in zip(read_metrics(a), read_metrics(b), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"images_per_second"}:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("supervise xbm* after a head epoch", (2,)),
        pytest.param("supervise axbn, queue sharded", (3,), marks=pytest.mark.slow),
        pytest.param("pretrain xbn", (3, 4), marks=pytest.mark.slow),
        pytest.param("pretrain xbn, queue sharded", (4,), marks=pytest.mark.slow),
        pytest.param("pretrain xbn, two micro-batches", (2,), marks=pytest.mark.slow),
        pytest.param("supervise xbn, two micro-batches", (2,), marks=pytest.mark.slow),
        pytest.param("supervise xbm* after a head epoch", (4,), marks=pytest.mark.slow),
        pytest.param("supervise without memory", (2,), marks=pytest.mark.slow),
    ],
)
def test_several_processes_equal_one_after_twenty_steps(tmp_path, name, numbers):
    assert main([*RUNS[name], "--out", str(tmp_path / "one")]) == 0
    assert read_metrics(tmp_path / "one")[-1]["step"] >= 20
    for processes in numbers:  # of a batch of 22 three have 7 and 8, four have 5 and 6; of 18 four have 4 and 5
        ended = launch(tmp_path / f"{processes}", processes, [*RUNS[name], "--out", str(tmp_path / f"of {processes}")])
        assert ended.codes == [0] * processes
        assert_same_run(tmp_path / "one", tmp_path / f"of {processes}")
        first, *others = (torch.load(tmp_path / f"{processes}" / f"rank-{r}.pt") for r in range(processes))
        sharded = {"queue.rows", "queue.labels"} if "--shard-queue" in RUNS[name] else set()
        for other in others:
            assert all(torch.equal(other[key], first[key]) for key in other.keys() - sharded)
        # before training, evaluations are those of one process to the last digit
        assert read_metrics(tmp_path / "one")[0] == read_metrics(tmp_path / f"of {processes}")[0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_split_batch_norm_equals_that_of_one_process(tmp_path, processes):
    options = ["pretrain", "--limit-train", "128", "--batch-size", "32", "--queue-size", "64", "--lr", "0.001"]
    options += ["--recipe", "digits", "--epochs", "1", "--bn-splits", "4", "--symmetric", "--drift-every", "2"]
    options += ["--eval-every", "0", "--limit-test", "64"]
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    ended = launch(tmp_path / "logs", processes, [*options, "--out", str(tmp_path / "several")])
    assert ended.codes == [0] * processes
    a, b = (checkpoint.load(tmp_path / name)["method"] for name in ("one", "several"))
    assert any("running_var" in name for name in a)
    assert_close(a, b)


@pytest.mark.slow
def test_signal_to_one_process_stops_all_and_any_number_resumes(tmp_path):
    options = [*PRETRAIN, "--adaptation", "axbn", "--shard-queue"]
    parts = str(tmp_path / "parts")

    def at(number, receiver):
        def interrupt(step, rank):
            if step == number and rank == receiver:
                os.kill(os.getpid(), signal.SIGTERM)

        return interrupt

    ended = launch(tmp_path / "a", 3, [*options, "--out", parts], at(5, receiver=1))
    assert ended.codes == [75] * 3
    assert "".join(ended.err) == "interrupted: stopped at epoch 1, step 6; continue with --resume\n"
    ended = launch(tmp_path / "b", 2, ["pretrain", "--resume", "--out", parts], at(9, receiver=0))
    assert ended.codes == [75] * 2
    assert checkpoint.load(tmp_path / "parts")["epoch"] == 1
    with interrupted_at(3):
        assert main(["pretrain", "--resume", "--out", parts]) == 75
    assert launch(tmp_path / "c", 3, ["pretrain", "--resume", "--out", parts]).codes == [0] * 3
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    assert_same_run(tmp_path / "one", tmp_path / "parts")


@pytest.mark.slow
def test_three_resumed_processes_equal_uninterrupted_ones(tmp_path):
    options = ["pretrain", "--limit-train", "128", "--batch-size", "32", "--queue-size", "64", "--epochs", "2"]
    options += ["--recipe", "digits"]

    def stop(step, rank):
        if step == 2 and rank == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert launch(tmp_path / "a", 3, [*options, "--out", str(tmp_path / "whole")]).codes == [0] * 3
    assert launch(tmp_path / "b", 3, [*options, "--out", str(tmp_path / "parts")], stop).codes == [75] * 3
    again = ["pretrain", "--resume", "--out", str(tmp_path / "parts")]
    assert launch(tmp_path / "c", 3, again).codes == [0] * 3
    whole, parts = (checkpoint.load(tmp_path / name)["method"] for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.slow
def test_signal_to_the_process_group_spares_the_data_workers(tmp_path):
    root = image_folder(tmp_path / "photos", classes=("a", "b", "c"), images=16)
    Image.new("RGB", (11, 9)).save(root / "train" / "a" / "0.png")  # of another size: read from disk
    options = ["pretrain", "--data", f"folder:{root}", "--backbone", "convnet-digits", "--image-size", "32"]
    options += ["--batch-size", "4", "--queue-size", "16", "--workers", "1", "--epochs", "1"]

    def stop(step, rank):
        if rank == 0 and step == 2:
            os.killpg(0, signal.SIGTERM)

    ended = launch(tmp_path / "a", 2, [*options, "--out", str(tmp_path / "run")], stop)
    assert ended.codes == [75, 75]
    assert checkpoint.load(tmp_path / "run")["step"] == 3


@pytest.mark.slow
def test_first_process_alone_writes_and_prints(tmp_path):
    ended = launch(tmp_path / "a", 2, [*SUPERVISE, "--epochs", "1", "--out", str(tmp_path / "run")])
    assert "epoch 1/1" in ended.out[0]
    assert str(tmp_path / "run") in ended.out[0]
    assert ended.out[1] + "".join(ended.err) == ""
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "best.pt",
        "curves.png",
        "retrieval.png",
    }
    assert json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["processes"] == "2"


@pytest.mark.slow
def test_error_of_any_process_is_printed_once(tmp_path):
    run = ["--out", str(tmp_path / "run")]
    ended = launch(tmp_path / "a", 2, [*PRETRAIN, "--queue-size", "999", *run])
    assert ended.codes == [2, 2]
    assert "".join(ended.err).count("\n") == 1
    assert "--queue-size: expected at most" in "".join(ended.err)
    ended = launch(tmp_path / "b", 2, [*PRETRAIN, "--batch-size", "3", *run])
    assert "--batch-size: expected at least 4, 2 images for each of 2 processes, got 3" in "".join(ended.err)
    ended = launch(tmp_path / "c", 3, [*PRETRAIN, "--bn-splits", "4", *run])
    assert "--bn-splits: expected 1 or a multiple of the number of processes, 3, got 4" in "".join(ended.err)
    assert not (tmp_path / "run").exists()

    def unreadable(step, rank):
        if rank == 1:
            raise UserError("cannot read cat.png")

    ended = launch(tmp_path / "d", 2, [*PRETRAIN, *run], unreadable)
    assert ended.codes == [4, 2]
    assert "".join(ended.err) == "error: cannot read cat.png\n"


@pytest.mark.slow
def test_processes_that_differ_are_refused(tmp_path):
    run = ["--out", str(tmp_path / "run")]

    def refusal(folder, own):
        ended = launch(tmp_path / folder, 2, lambda rank: [*PRETRAIN, *run, *(own if rank == 1 else [])])
        assert ended.codes == [2, 2]
        assert not (tmp_path / "run").exists()
        return "".join(ended.err)

    expected = "error: process 1: --lr: expected 0.01 as in process 0, got 0.02\n"
    assert refusal("a", ["--lr", "0.02"]) == expected
    assert "process 1: --seed: expected 0 as in process 0, got 1" in refusal("b", ["--seed", "1"])
    photos = [image_folder(tmp_path / root, images=images) for root, images in (("x/photos", 8), ("y/photos", 9))]

    def from_photos(rank):
        os.chdir(photos[rank].parent)
        return ["pretrain", "--data", "folder:photos", "--batch-size", "4", "--queue-size", "4", *run]

    ended = launch(tmp_path / "c", 2, from_photos)
    assert ended.codes == [2, 2]
    assert "process 1: data: train: expected '16 images, labels " in "".join(ended.err)
    assert "got '18 images" in "".join(ended.err)


@pytest.mark.slow
def test_only_the_first_process_needs_the_run_folder(tmp_path):
    options = ["pretrain", "--limit-train", "128", "--batch-size", "64", "--queue-size", "64", "--backbone", "plain"]
    options += ["--recipe", "digits"]

    def run(folder, seed="0"):
        arguments = [*options, "--epochs", "2", "--seed", seed, "--out", str(tmp_path / folder)]
        with interrupted_at(3):
            assert main(arguments) == 75

    def resumed(folder):
        return ["pretrain", "--resume", "--out", str(tmp_path / folder)]

    run("first")
    run("other", seed="1")
    ended = launch(
        tmp_path / "a",
        2,
        lambda rank: ["pretrain", "--resume", "--out", str(tmp_path / ("other" if rank else "first"))],
    )
    assert ended.codes == [2, 2]
    assert re.search("error: process 1: checkpoint: expected .*, epoch 1, step 1' as in process 0", "".join(ended.err))
    ended = launch(tmp_path / "b", 2, lambda rank: resumed("none" if rank else "first"))
    assert ended.codes == [0, 0]
    assert not (tmp_path / "none").exists()
    first, second = (torch.load(tmp_path / "b" / f"rank-{r}.pt") for r in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_killed_process_is_restarted_and_ends_bit_for_bit(tmp_path):
    def killed(step, rank):
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if (attempt, rank, step) in ((0, 1, 3), (1, 0, 14), (2, 1, 2)):  # before and after the first checkpoint
            os.kill(os.getpid(), signal.SIGKILL)

    whole, parts = (["--out", str(tmp_path / name)] for name in ("whole", "parts"))
    assert launch(tmp_path / "a", 2, [*PRETRAIN, *whole]).codes == [0, 0]
    assert torchrun(tmp_path / "b", 2, [*PRETRAIN, *parts], killed)
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


@pytest.mark.slow
def test_restart_does_not_continue_the_run_of_another_launch(tmp_path):
    run = ["--out", str(tmp_path / "run")]
    assert launch(tmp_path / "a", 2, [*PRETRAIN, *run, "--epochs", "1"]).codes == [0, 0]
    before = contents(tmp_path / "run")
    assert not torchrun(tmp_path / "b", 2, [*PRETRAIN, *run, "--epochs", "1"], max_restarts=1)
    errors = [(tmp_path / "b" / f"err-{rank}").read_text() for rank in range(2)]
    assert "".join(errors).count("already has a run") == 2
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("fate", ["killed", pytest.param("hung", marks=pytest.mark.slow)])
def test_lost_process_ends_the_other_with_one_line(tmp_path, fate):
    def happens(step, rank):
        if rank == 1 and step == 3:
            while fate == "hung" and not (tmp_path / "a" / "err-0").read_text():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

    timeout = 4 if fate == "hung" else 10 * PATIENCE  # a killed process is noticed without waiting
    ended = launch(tmp_path / "a", 2, [*PRETRAIN, "--timeout", str(timeout), "--out", str(tmp_path / "run")], happens)
    assert ended.codes == [4, -signal.SIGKILL]
    assert bool(re.search(r"\(.*(Timed out|timeout caused)", ended.err[0])) == (fate == "hung")
    assert ended.err[0].startswith("lost: another process of the run ended or did not respond")
    assert "--resume" in ended.err[0]
    assert ended.err[0].count("\n") == 1


def test_parts_are_consecutive_and_differ_by_one_at_most():
    for total, n in ((22, 4), (360, 7), (3, 3), (128, 1)):
        parts = [range(total)[shard_slice(total, (r, n))] for r in range(n)]
        assert [row for rows in parts for row in rows] == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
