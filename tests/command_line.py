"""Helpers for tests that call the command line: refusals, small image folders, interruptions."""

import contextlib
import os
import signal

import numpy as np
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from selfsup_xbn.cli import main

PRETRAIN, SUPERVISE = ["pretrain", "--recipe", "digits"], ["supervise", "--recipe", "digits-disjoint"]
"""Beginnings of commands whose runs take a second: the default recipes train for longer."""
SMALL = [*PRETRAIN, "--limit-train", "128", "--batch-size", "64", "--queue-size", "64", "--epochs", "1"]


def refused(capsys, argv):
    """Return the one line that a refused command prints."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    return err


def image_folder(root, classes=("a", "b"), images=3):
    """Write ``root/{train,test}/CLASS/*.png``: random images of 8 x 8 pixels."""
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(images):
                pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@contextlib.contextmanager
def each_step(action):
    """Call ``action(optimizer)`` after each optimizer step of this process; yield the list of steps done."""
    steps = []

    def count(optimizer, args, kwargs):
        steps.append(len(steps) + 1)
        action(optimizer)

    handle = register_optimizer_step_post_hook(count)
    try:
        yield steps
    finally:
        handle.remove()


@contextlib.contextmanager
def interrupted_at(*numbers, by=signal.SIGTERM):
    """Send this process a signal in the optimizer steps of these numbers, from 1; yield the list of steps done."""
    with each_step(lambda _: len(steps) in numbers and os.kill(os.getpid(), by)) as steps:
        yield steps


def contents(folder):
    """Return the bytes of each file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
