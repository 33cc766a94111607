"""Steps of several micro-batches: what the queue takes, what is logged, and what is refused."""

import pytest
import torch

from selfsup_xbn.cli import main
from selfsup_xbn.memory import FeatureQueue
from selfsup_xbn.models.backbones import SMALL_BACKBONES
from selfsup_xbn.runs import checkpoint
from tests.command_line import interrupted_at, refused
from tests.finished_runs import differences

STEPS = ["--limit-train", "64", "--batch-size", "16", "--queue-size", "40", "--backbone", "convnet-digits"]
STEPS += ["--limit-test", "64", "--epochs", "1", "--eval-every", "0", "--drift-every", "0", "--accumulate", "4"]
PRETRAIN = ["pretrain", "--recipe", "digits", *STEPS]
SUPERVISE = ["supervise", "--recipe", "digits-disjoint", *STEPS, "--images-per-class", "4"]


@pytest.mark.parametrize(
    ("options", "batches", "note"),
    [
        (PRETRAIN, [16] * 4, "the queue is adapted to and takes all 16 keys of a step at once"),
        (
            SUPERVISE,
            [4] * 16,
            "takes the 4 embeddings of each micro-batch in turn",
        ),
    ],
)
def test_queue_takes_batch_or_micro_batch_as_logged(tmp_path, capsys, monkeypatch, unchecked, options, batches, note):
    taken, enqueue = [], FeatureQueue.enqueue

    def counted(queue, batch, *labels):
        if queue.size == 40:  # not that of the trial of the loss
            taken.append(len(batch))
        return enqueue(queue, batch, *labels)

    monkeypatch.setattr(FeatureQueue, "enqueue", counted)
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    assert taken == batches
    assert note in capsys.readouterr().out


def test_micro_batches_of_moco_without_batch_norm_are_the_batch(tmp_path, monkeypatch, unchecked):
    def layers(channels):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh())

    monkeypatch.setitem(SMALL_BACKBONES, "plain", layers)
    options = [*PRETRAIN, "--backbone", "plain", "--symmetric"]
    for parts in ("1", "4"):
        assert main([*options, "--accumulate", parts, "--out", str(tmp_path / parts)]) == 0
    one, four = (checkpoint.load(tmp_path / parts)["method"] for parts in ("1", "4"))
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_interrupted_run_of_micro_batches_is_resumed_bit_for_bit(tmp_path, unchecked):
    assert main([*SUPERVISE, "--out", str(tmp_path / "whole")]) == 0
    with interrupted_at(2):
        assert main([*SUPERVISE, "--out", str(tmp_path / "parts")]) == 75
        assert main(["supervise", "--resume", "--out", str(tmp_path / "parts")]) == 0
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


def test_micro_batches_that_do_not_divide_the_batch_are_refused(tmp_path, capsys):
    run = ["--out", str(tmp_path / "run")]
    message = refused(capsys, [*PRETRAIN, "--accumulate", "3", *run])
    assert "--accumulate 3: expected a divisor of --batch-size 16" in message
    assert "whole images and classes" in refused(capsys, [*SUPERVISE, "--images-per-class", "8", *run])
    assert "--accumulate 16: expected at least 2 images" in refused(capsys, [*PRETRAIN, "--accumulate", "16", *run])
