"""Checks before training: the queue's memory and size, labels, and a changed option on resume."""

import random
from collections import deque
from dataclasses import replace

import pytest
import torch
from PIL import Image

from selfsup_xbn.cli import main
from selfsup_xbn.config.modes import PretrainConfig, SuperviseConfig
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.data import Split
from selfsup_xbn.errors import UserError
from selfsup_xbn.methods.base import method_class
from selfsup_xbn.models.encoder import random_encoder
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.training import preflight as limits
from tests.command_line import PRETRAIN, SMALL, refused


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [PretrainConfig(queue_size="500"), SuperviseConfig(queue_size="50%")])
def test_queue_bytes_are_those_allocated(config, dtype):
    config = replace(config, queue_dtype=dtype, dim=96)
    with torch.device("meta"):
        queue = method_class(config).from_config(config, random_encoder(config, 1, 8), 1000).queue
    allocated = sum(buffer.numel() * buffer.element_size() for buffer in queue.buffers(recurse=False))
    assert limits.queue_bytes(config, 1000) == pytest.approx(allocated, abs=100)


def test_no_queue_takes_no_bytes():
    assert limits.queue_bytes(SuperviseConfig(queue_size="0"), 1000) == 0


def test_queue_that_does_not_fit_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limits, "free_bytes", lambda device: 10**9)
    options = ["--queue-size", "1000", "--dim", "1000000", "--out", str(tmp_path / "run")]
    message = refused(capsys, [*PRETRAIN, *options])
    parts = ("1,000 rows of 1,000,000", "4,032,000,000 bytes", "cpu has 1,000,000,000 free", "--queue-dtype bfloat16")
    assert all(part in message for part in parts)
    assert not (tmp_path / "run").exists()


def test_free_memory_is_below_the_machines_total():
    with open("/proc/meminfo") as lines:
        total = 1024 * int(next(line for line in lines if line.startswith("MemTotal")).split()[1])
    assert 2**20 < limits.free_bytes(torch.device("cpu")) < total


@pytest.mark.parametrize(("rows", "epochs", "said"), [(64, 2, False), (65, 2, True), (128, 2, True), (128, 1, False)])
def test_queue_in_which_anchors_meet_themselves_is_noted(tmp_path, capsys, rows, epochs, said):
    assert main([*SMALL, "--queue-size", str(rows), "--epochs", str(epochs), "--out", str(tmp_path)]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "meet their own image" in line]
    assert len(notes) == said
    assert all("as a negative; with half the --queue-size" in note for note in notes)


def test_the_note_names_the_share_with_half_the_queue():
    note = limits.queue_note(PretrainConfig(batch_size=8, queue_size="64"), 64)
    # Of 64 rows, 56, 48, ... 0 are of the previous epoch at the steps of an epoch; of 32 rows 24, 16, 8, 0, ...
    assert f"about {sum(range(0, 64, 8)) / 8 / 64:.0%} of the anchors" in note
    assert note.endswith(f"; with half the --queue-size {sum(range(0, 32, 8)) / 8 / 64:.0%}")


def test_the_note_on_a_large_queue_is_short():
    images = 1_281_167
    for config in (PretrainConfig(queue_size="100%"), SuperviseConfig(queue_size="100%")):
        assert 0 < len(limits.queue_note(config, images)) <= 160


@pytest.mark.parametrize("rows", [8, 12, 21, 24])
def test_self_match_fraction_is_that_of_a_simulated_queue(rows):
    images, batch, epochs = 24, 4, 1500
    queue, met, generator = deque(maxlen=rows), 0, random.Random(0)
    for epoch in range(epochs + 1):
        order = generator.sample(range(images), images)
        for start in range(0, images, batch):
            for image in order[start : start + batch]:
                queue.append((epoch, image))
            met += sum((epoch - 1, image) in queue for image in order[start : start + batch])
    assert limits.self_match_fraction(rows, images, batch) == pytest.approx(met / (epochs * images), abs=0.01)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, -1]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0.0, 1.0])]
)
def test_labels_that_are_no_class_numbers_are_refused(labels, unchecked):
    with pytest.raises(
        UserError,
        match=r"^expected int64 labels of at least 0, got torch.\w+ labels with minimum \S+; "
        r"number the classes from 0$",
    ):
        Split(labels, paths=["a", "b"])


def test_another_dimension_on_resume_is_refused(finished_run, capsys):
    dim = RECIPES["digits"].dim
    command = ["pretrain", "--resume", "--out", str(finished_run)]
    assert f"--dim: the run has {dim}, the command has {2 * dim}" in refused(capsys, [*command, "--dim", str(2 * dim)])
    state = checkpoint.load(finished_run)
    state["method"]["queue.rows"] = torch.zeros(64, 2 * dim)
    checkpoint.save(state, finished_run)
    message = refused(capsys, command)
    assert "does not fit this run" in message
    assert "queue.rows" in message


@pytest.mark.parametrize("enqueue", ["before_loss", "after_loss"])
def test_a_queue_that_is_empty_at_the_first_loss_is_noted(enqueue, tmp_path, capsys):
    assert main([*SMALL, "--enqueue", enqueue, "--out", str(tmp_path)]) == 0
    assert ("the queue is empty at the first step" in capsys.readouterr().out) == (enqueue == "after_loss")
    assert "the queue is empty" not in limits.empty_queue_note(SuperviseConfig())


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_a_dry_run_finds_truncated_images(tmp_path, capsys, kind):
    paths = [tmp_path / f"{number}.png" for number in range(64)]
    for number, path in enumerate(paths):
        pixels = torch.randint(256, (20 + number, 20, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(path.name for path in paths))
    spec = f"folder:{tmp_path}" if kind == "folder" else f"list:{tmp_path}/list.csv"
    options = ["--backbone", "convnet4", "--batch-size", "8", "--queue-size", "16", "--workers", "0"]
    command = ["pretrain", "--data", spec, *options, "--dry-run"]
    assert main(command) == 0
    capsys.readouterr()
    paths[7].write_bytes(paths[7].read_bytes()[:600])
    assert f"{paths[7]}: the image cannot be decoded" in refused(capsys, command)
    for path in paths[2:62]:
        path.write_bytes(path.read_bytes()[:600])
    message = refused(capsys, command)
    assert message.startswith("error: 60 images cannot be decoded; repair or remove the files: ")
    assert sum(f"{path}" in message for path in paths) == limits.SHOWN
    assert message.strip().endswith("and 10 more")
