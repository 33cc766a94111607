"""What a queue, its labels and a resumed run may not be: each is said in one line before anything is allocated."""

import random
from collections import deque
from dataclasses import replace

import pytest
import torch
from test_cli import refused

from selfsup_xbn.cli import main
from selfsup_xbn.config.schema import PretrainConfig, SuperviseConfig
from selfsup_xbn.data import Split
from selfsup_xbn.errors import UserError
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.training import build
from selfsup_xbn.training import preflight as limits

SMALL = ["pretrain", "--limit-train", "128", "--batch-size", "64", "--queue-size", "64", "--epochs", "1"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [PretrainConfig(queue_size=500), SuperviseConfig(queue_size="50%")])
def test_bytes_are_those_of_the_queue_that_is_made(config, dtype):
    config = replace(config, queue_dtype=dtype, dim=96)
    with torch.device("meta"):
        queue = build.method_of(config, build.random_encoder(config, 1, 8), 1000).queue
    allocated = sum(buffer.numel() * buffer.element_size() for buffer in queue.buffers(recurse=False))
    assert limits.queue_bytes(config, 1000) == pytest.approx(allocated, abs=100)


def test_a_run_without_a_queue_takes_no_bytes():
    assert limits.queue_bytes(SuperviseConfig(queue_size="0"), 1000) == 0


def test_a_queue_that_does_not_fit_is_refused_before_it_is_allocated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limits, "free_bytes", lambda device: 10**9)
    monkeypatch.setattr(FeatureQueue, "__init__", lambda *_, **__: pytest.fail("it was allocated"))
    options = ["--queue-size", "1000", "--dim", "1000000", "--out", str(tmp_path / "run")]
    message = refused(capsys, ["pretrain", *options])
    for part in (
        "1,000 rows of 1,000,000",
        "4,032,000,000 bytes",
        "cpu has 1,000,000,000 free",
        "--queue-dtype bfloat16",
    ):
        assert part in message
    assert not (tmp_path / "run").exists()


def test_free_memory_is_some_of_this_machines():
    with open("/proc/meminfo") as lines:
        total = 1024 * int(next(line for line in lines if line.startswith("MemTotal")).split()[1])
    assert 2**20 < limits.free_bytes(torch.device("cpu")) < total


@pytest.mark.parametrize(("rows", "said"), [(64, False), (65, True), (128, True)])
def test_a_queue_in_which_an_anchor_meets_itself_is_noted_and_allowed(tmp_path, capsys, rows, said):
    assert main([*SMALL, "--queue-size", str(rows), "--out", str(tmp_path)]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: a queue of")]
    assert len(notes) == said
    assert not said or "of the anchors meet their own image's last row as a negative" in notes[0]


@pytest.mark.parametrize("rows", [8, 12, 21, 24])
def test_the_share_of_anchors_that_meet_themselves_is_that_of_a_simulated_queue(rows):
    images, batch, epochs = 24, 4, 1500
    queue, met, generator = deque(maxlen=rows), 0, random.Random(0)
    for epoch in range(epochs + 1):
        order = generator.sample(range(images), images)
        for start in range(0, images, batch):
            for image in order[start : start + batch]:
                queue.append((epoch, image))
            met += sum((epoch - 1, image) in queue for image in order[start : start + batch])
    assert limits.self_meetings(rows, images, batch) == pytest.approx(met / (epochs * images), abs=0.01)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, -1]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0.0, 1.0])]
)
def test_labels_that_are_no_class_numbers_are_refused_in_one_line(labels, unchecked):
    with pytest.raises(
        UserError, match=r"^expected int64 labels from 0 on, got torch.\w+ from \S+ on: number the classes$"
    ):
        Split(labels, paths=["a", "b"])


def test_another_dimension_on_resume_is_one_line(tmp_path, capsys):
    assert main([*SMALL, "--dim", "16", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert "dim: 16, 32" in refused(capsys, ["pretrain", "--resume", "--dim", "32", "--out", str(tmp_path)])
    state = checkpoint.load(tmp_path)
    state["method"]["queue.rows"] = torch.zeros(64, 32)
    checkpoint.save(state, tmp_path)
    message = refused(capsys, ["pretrain", "--resume", "--out", str(tmp_path)])
    assert "does not fit this run" in message
    assert "queue.rows" in message
