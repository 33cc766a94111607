"""Control characters of names reach no message, page or picture; names of the user's own extensions are explained."""

from __future__ import annotations

import json
import os
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from selfsup_xbn.cli import main
from selfsup_xbn.errors import Diverged, UserError, printable
from selfsup_xbn.report.curves import draw_curves
from selfsup_xbn.utils.console import show
from tests.command_line import image_folder, refused

EVIL = "\x1b[2J\x07\u202e\x9b"
TINY = ["--batch-size", "8", "--queue-size", "8", "--dim", "8", "--epochs", "1"]
TINY += ["--backbone", "convnet-digits", "--weights="]
ESCAPED = r"\x1b[2J\x07\u202e\x9b"


def raw(text: str) -> list[str]:
    """Return the characters that are not printable, except line ends."""
    return [char for char in text if not char.isprintable() and char != "\n"]


def test_printable_escapes_what_python_calls_unprintable():
    for code in (*range(0x300), 0x200B, 0x2028, 0x202E, 0x2066, 0xDC80, 0xFEFF, 0xE0001, 0x1F600):
        text = printable(f"a{chr(code)}b")
        assert text.isprintable()
        assert (text == f"a{chr(code)}b") == chr(code).isprintable()
        assert printable(text) == text
        text.encode()


def test_messages_of_errors_are_printable_everywhere():
    error = UserError(f"{EVIL}: no\nsuch file")
    assert str(error) == rf"{ESCAPED}: no\nsuch file"
    assert str(type(error)(*error.args)) == str(error)


def test_lines_of_a_command_are_printable(capsys):
    show([f"a{EVIL}", "b"])
    show([])
    assert capsys.readouterr().out == f"a{ESCAPED}\nb\n"


@pytest.fixture
def evil_photos(tmp_path):
    """Image folders with control characters in the names of the root, a class, a file and a file that is skipped."""
    root = image_folder(tmp_path / f"photos{EVIL}", classes=("a", f"b{EVIL}"), images=8)
    for path in root.glob("test/*/[2-7].png"):  # fewer pictures to draw
        path.unlink()
    (root / "train/a" / f"skipped{EVIL}.gif{EVIL}").touch()
    os.mkfifo(root / "train/a" / f"fifo{EVIL}.png")
    return root


@pytest.mark.slow
def test_names_of_files_and_classes_reach_no_output_raw(tmp_path, evil_photos, capsys, pictures, monkeypatch):
    titles, suptitle = [], Figure.suptitle
    monkeypatch.setattr(
        Figure, "suptitle", lambda self, text, **how: (titles.append((text, how)), suptitle(self, text, **how))[1]
    )
    run = str(tmp_path / f"run{EVIL}")
    data = ["--data", f"folder:{evil_photos}", "--workers", "0"]
    commands = [
        ["supervise", *TINY, *data, "--images-per-class", "4", "--augmentation", "none", "--out", run],
        ["evaluate", "retrieval", "--run", run, "--workers", "0"],
        ["report", run, "--out", str(tmp_path / "page")],
        ["export", run, "--format", "csv"],
    ]
    for command in commands:
        assert main(command) == 0
    out, err = capsys.readouterr()
    assert raw(out + err) == []
    assert ESCAPED in out
    page = (tmp_path / "page/index.html").read_text()
    assert raw(page) == []
    assert f"b{ESCAPED}" in page
    assert len(titles) == 2
    assert all(raw(text) == [] for text, _ in titles)


def test_dollar_signs_of_a_path_are_no_formula_in_a_picture(finished_run, pictures):
    config = json.loads((finished_run / "config.json").read_text())
    (finished_run / "config.json").write_text(json.dumps(config | {"data": "folder:a$^_$b"}))
    with Image.open(draw_curves(finished_run)) as picture:
        assert np.asarray(picture).std() > 0


@pytest.mark.parametrize("kind", ["image", "weights", "run", "list", "option", "tensor", "warning", "diverged"])
def test_refusals_name_files_without_their_control_characters(tmp_path, capsys, monkeypatch, kind):
    path = tmp_path / f"name{EVIL}"
    weights = ["evaluate", "knn", "--backbone", "convnet-digits", "--data", "digits", "--weights"]
    command = ["evaluate", "knn", "--run", str(path)]
    if kind == "image":
        image_folder(path)
        (path / f"train/a/x{EVIL}.png").write_bytes(b"no image")
        command = ["pretrain", "--data", f"folder:{path}", "--out", str(tmp_path / "run")]
    elif kind == "weights":
        command = [*weights, str(path)]
    elif kind == "tensor":
        torch.save({f"x{EVIL}": torch.zeros(3)}, path)
        command = [*weights, str(path)]
    elif kind == "list":
        path.mkdir()
        command = ["pretrain", "--data", f"sop:{path}", "--out", str(tmp_path / "run")]
    elif kind == "option":
        command = ["pretrain", f"--x{EVIL}"]
    elif kind in ("warning", "diverged"):

        def evaluate(*_, **__):
            warnings.warn(f"x{EVIL}", stacklevel=1)
            raise (OSError if kind == "warning" else Diverged)(f"y{EVIL}")

        monkeypatch.setattr("selfsup_xbn.commands.evaluate.evaluate_run", evaluate)
    assert main(command) in (2, 3)
    err = capsys.readouterr().err
    assert raw(err) == []
    assert ESCAPED in err


def test_run_with_an_own_adaptation_says_how_to_evaluate_it(finished_run, capsys):
    config = json.loads((finished_run / "config.json").read_text())
    for name, value in (("adaptation", "mine"), ("mode", "mymode")):
        (finished_run / "config.json").write_text(json.dumps(config | {name: value}))
        message = refused(capsys, ["evaluate", "knn", "--run", str(finished_run)])
        assert (
            f"got '{value}'; if it is your own, call selfsup_xbn.cli.main from the program that registers it" in message
        )


def test_resume_names_the_value_of_the_run_and_of_the_command(finished_run, capsys):
    command = ["pretrain", "--resume", "--out", str(finished_run), "--lr", "0.5"]
    assert "(--lr: the run has 0.06, the command has 0.5)" in refused(capsys, command)
