"""Comparisons: cells and seeds in worker processes, interrupted, resumed and failed; their table, curves and page."""

from __future__ import annotations

import os
import signal
import statistics
from multiprocessing import Pipe, get_context
from types import SimpleNamespace

import pytest

from selfsup_xbn.cli import main
from selfsup_xbn.commands import jobs
from selfsup_xbn.commands.board import Board
from selfsup_xbn.commands.jobs import Job, Report, run_jobs
from selfsup_xbn.config.modes import PretrainConfig
from selfsup_xbn.errors import Interrupted
from selfsup_xbn.report.comparison import comparison_lines, draw_comparison
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.runs.results import FINISHED, read
from selfsup_xbn.training.trainer import train
from tests.command_line import refused
from tests.finished_runs import differences

TINY = ["--recipe", "digits", "--limit-train", "128", "--batch-size", "32", "--queue-size", "64", "--dim", "16"]
COMPARE = ["compare", "pretrain", *TINY, "--drift-every", "0", "--knn-k", "5"]


def result(label, values, **more):
    """A cell of a results file with a final k-NN accuracy for each seed."""
    seeds = {str(seed): {"knn_top1": value} for seed, value in enumerate(values)}
    mean, std = {"knn_top1": statistics.mean(values)}, {"knn_top1": statistics.stdev(values)}
    history = {seed: {"knn_top1": {"1": 1.0, "2": final["knn_top1"]}} for seed, final in seeds.items()}
    config = {"mode": "pretrain", "data": "digits", "batch_size": 32}
    return {"label": label, "seeds": seeds, "mean": mean, "std": std, "history": history, "config": config} | more


@pytest.fixture
def forked(monkeypatch, unchecked):
    """Fork the worker processes, which then import nothing. The slow test below starts new ones, as a user does."""
    fork, ends = get_context("fork"), []

    def pipe():
        ends.append(fork.Pipe())
        return ends[-1]

    def process(target, args):
        def work():
            for parents, _ in ends:  # which a new process does not have
                parents.close()
            target(*args)

        return fork.Process(target=work)

    monkeypatch.setattr(jobs, "get_context", lambda _: SimpleNamespace(Pipe=pipe, Process=process))


@pytest.mark.usefixtures("forked")
def test_cells_are_trained_resumed_and_compared(tmp_path, capfd):
    """Two processes finish two cells; a third cell fails and is named. Finished runs are kept."""
    cells = ["--cell", "plain", "adaptation=xbm", "--cell", "bad", "lr=1e30", "--cell", "XBN", "adaptation=xbn"]
    command = [*COMPARE, *cells, "--epochs", "2", "--seeds", "2", "--jobs", "2", "--out", str(tmp_path)]
    assert main(command) == 5
    printed, errors = capfd.readouterr()
    assert errors.startswith("failed: 2 of 6 runs failed")
    assert "bad, seed 0: expected a finite loss" in errors
    assert "bad, seed 1" in errors
    assert printed.count("k-NN") == 5  # a line for each finished run, and the table
    plain, xbn = read(tmp_path / "results.json")
    assert [list(cell["seeds"]) for cell in (plain, xbn)] == [["0", "1"]] * 2
    finished = {path.parent: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob(f"*/{FINISHED}")}
    assert len(finished) == 4
    for folder in finished:
        final = read_metrics(folder)[-1]
        cell = plain if "xbm" in folder.name else xbn
        assert cell["seeds"][folder.name[-1]]["knn_top1"] == final["knn_top1"]
    pairs = [xbn["seeds"][seed]["knn_top1"] - plain["seeds"][seed]["knn_top1"] for seed in "01"]
    assert f"{statistics.mean(pairs):+.2f} ± {statistics.stdev(pairs) / 2**0.5:.2f}" in printed
    page = (tmp_path / "index.html").read_text()
    assert page.count("seeds 0, 1") == 2
    assert 'class="band"' in page
    assert (tmp_path / "comparison.png").exists()
    assert "warnings: " not in printed

    del command[command.index("bad") - 1 : command.index("bad") + 2]
    assert main(command) == 0
    printed, errors = capfd.readouterr()
    assert (errors, "finished" in printed) == ("", False)
    assert all((folder / FINISHED).stat().st_mtime_ns == time for folder, time in finished.items())


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_warnings_of_runs_are_named_after_the_table(tmp_path, capfd):
    """Both runs of the only process warn, of k-NN with more neighbors than images; a repeated command says so again."""
    command = [
        *COMPARE[:-1],
        "500",
        "--cell",
        "plain",
        "adaptation=xbm",
        "--epochs",
        "1",
        "--seeds",
        "2",
        "--jobs",
        "1",
    ]
    for _ in range(2):
        assert main([*command, "--out", str(tmp_path)]) == 0
        lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warnings: ")]
        logs = sorted((tmp_path / "runs").glob("*.log"))
        assert lines == [f"warnings: plain, seed {seed} ({log})" for seed, log in enumerate(logs)]
    for log in logs:
        assert "\nwarning: k-NN: k=500 exceeds the 128 neighbors" in "\n" + log.read_text()
        assert "UserWarning" not in log.read_text()


@pytest.mark.slow
def test_interrupted_runs_continue_bit_for_bit(tmp_path):
    options = {
        "limit_train": 128,
        "batch_size": 32,
        "queue_size": "64",
        "epochs": 60,
        "eval_every": 0,
        "drift_every": 0,
    }
    job, whole = (Job("a", 0, PretrainConfig(**options, out=str(tmp_path / name))) for name in ("parts", "whole"))
    with pytest.raises(Interrupted, match="repeat the command to continue"):  # noqa: PT012  (an iterator)
        for report in run_jobs([job], processes=1):
            assert not report.ended
            os.kill(os.getpid(), signal.SIGINT)
    assert checkpoint.load(job.folder)["epoch"] < 4
    assert not (job.folder / FINISHED).exists()
    assert [report.error for report in run_jobs([job], processes=1) if report.ended] == [""]
    assert (job.folder / FINISHED).exists()
    train(whole.config)
    assert differences(whole.folder, job.folder) == []


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--vary", "adaptaton=xbm"], ["--adaptaton", "did you mean adaptation"]),
        (["--vary", "adaptation=xbm,xbq"], ["xbq", "xbm, xbn, axbn"]),
        (["--vary", "batch-size=32,3000"], ["cell 'batch-size=3000'", "128", "3000"]),
        (["--vary", "backbone=convnet5"], ["cell 'backbone=convnet5'", "convnet4"]),
        (["--cell", "mine", "data=folder:/no/such"], ["cell 'mine'", "/no/such"]),
        (["--seeds", "0"], ["--seeds", "at least 1"]),
        (["--jobs", "-1"], ["--jobs", "at least 1"]),
        (["--resume"], ["--resume"]),
        (["--out", "/dev/null"], ["/dev/null", "is a file"]),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(tmp_path, monkeypatch, capsys, options, parts):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, [*COMPARE, *options])
    assert [part for part in parts if part not in message] == []
    assert list(tmp_path.iterdir()) == []


def test_commands_of_the_cells_are_printed(capsys):
    assert main([*COMPARE, "--vary", "adaptation=xbm,axbn", "lr=1,2", "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [f"# adaptation={name}, lr={lr}" for name in ("xbm", "axbn") for lr in (1, 2)]
    assert all("--data digits" in line for line in lines[1::2])


def test_worker_that_ends_by_itself_is_a_failed_run():
    here, there = Pipe()
    there.close()
    worker = jobs._Worker(threads=1)
    worker.job, worker.connection = Job("a", 0, PretrainConfig()), here
    worker.process = SimpleNamespace(join=lambda: None, exitcode=-9)
    report = worker.report()
    assert (report.ended, report.error) == (True, "its process ended with exit code -9")
    assert (worker.job, worker.process) == (None, None)  # the next job gets a new process


def test_differences_of_the_table_are_paired(tmp_path):
    results = [result("a", [10.0, 20.0]), result("b", [11.0, 23.0]), result("c", [10.0, 30.0])]
    lines = comparison_lines(results, "knn_top1")
    cells = [[text.strip() for text in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert cells[1][:3] == ["a", "15.00 ± 7.07", ""]
    assert cells[2][:3] == ["b", "17.00 ± 8.49", "+2.00 ± 1.00"]
    assert cells[3][:3] == ["c", "20.00 ± 14.14", "+5.00 ± 5.00"]
    assert len({len(line) for line in lines[:5]}) == 1


def test_curves_are_means_and_bands_deviations(tmp_path, pictures, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.fill_between", lambda axes, x, low, high, **_: drawn.append((x, low, high))
    )
    cells = [result("a", [10.0, 20.0]), result("b", [11.0, 23.0])]
    draw_comparison(cells, "knn_top1", tmp_path / "curves.png")
    x, low, high = drawn[1]
    assert x == [1, 2]
    assert [low[1], high[1]] == pytest.approx([17 - 72**0.5, 17 + 72**0.5])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_time_left_counts_runs_in_progress(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("selfsup_xbn.commands.board.time.monotonic", lambda: now[0])
    runs = [Job("a", seed, PretrainConfig()) for seed in range(4)]
    board = Board([job.name for job in runs], finished=1)
    now[0] = 30.0
    board.show(Report(runs[1], 5, 10))
    assert board.seconds_left == pytest.approx(30 / 0.5 * 2.5)
    board.show(Report(runs[2], 0, 1, ended=True), "k-NN 50.0 %")
    assert board.seconds_left == pytest.approx(30 / 1.5 * 1.5)
    assert "a, seed 2   k-NN 50.0 %   2 of 4, 30 s left" in capsys.readouterr().out
    board.close()
