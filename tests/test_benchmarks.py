"""The benchmarks: goals and verdicts, parts of a profile, workers, and peers that compute the same answers."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experiments.benchmarks import knn_parts, parts, processes, step_parts
from experiments.benchmarks.__main__ import main as benchmark
from experiments.benchmarks.__main__ import measure, measured_on, ratio, verdict
from experiments.benchmarks.__main__ import table as work_table
from experiments.benchmarks.evaluators import KS, WORKS
from experiments.benchmarks.parts import ALL, REST
from experiments.benchmarks.works import GOALS, Goal, works


def test_every_goal_is_about_works_that_exist():
    for goal in GOALS:
        names = {goal.name, *goal.than.split(" + ")} - {""}
        assert names <= set(works(goal.device)[goal.work])


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("w", "a", "b", 1.9), False),
        (Goal("w", "a", "b", 2.1), True),
        (Goal("w", "a", "b + c", 1.5), True),
        (Goal("w", "a", "b + c", 1.2), False),
        (Goal("w", "a", "b", 0.9, "s more than"), False),
        (Goal("w", "a", "", 2.0, "s"), True),
        (Goal("w", "a", "", 9, "MB peak"), False),
        (Goal("w", "a", "", 9, "MB more"), True),
    ],
)
def test_verdicts_compare_the_right_numbers(goal, met):
    found = {
        "a": {"seconds": 2.0, "rounds": [2.0], "peak_bytes": 10 * 2**20, "extra_bytes": 2**20},
        "b": {"seconds": 1.0, "rounds": [1.0], "peak_bytes": 0, "extra_bytes": 0},
        "c": {"seconds": 0.5, "rounds": [0.5], "peak_bytes": 0, "extra_bytes": 0},
    }
    assert verdict(goal, found).startswith("met" if met else "NOT MET")


def test_ratios_are_those_of_a_round():
    a, b, c = ({"rounds": rounds} for rounds in ([1.0, 4.0, 10.0], [1.0, 1.0, 8.0], [1.0, 1.0, 2.0]))
    assert ratio(a, [b]) == 1.25  # the machine was slow in the last round; of medians it is 4
    assert ratio(a, [b, c]) == 1.0


@pytest.mark.slow
def test_benchmarks_measure_in_separate_processes(tmp_path, capsys):
    benchmark(["memory-4096", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "benchmarks-cpu.json").read_text())["memory-4096"]["names"]
    assert set(found) == {"XBM", "XBN"}
    assert all(values["seconds"] > 0 and values["extra_bytes"] >= 0 for values in found.values())
    assert "memory-4096: XBN at most 1.03 x XBM" in capsys.readouterr().out


def test_work_is_measured_with_what_its_device_has(monkeypatch):
    made = []

    class NoWorker:
        present = False

        def __init__(self, work, name, options):
            made.append(name)

        def end(self):
            pass

    monkeypatch.setattr("experiments.benchmarks.__main__.Worker", NoWorker)
    for device, expected in (("cuda", True), ("cpu", False)):
        made.clear()
        measure("supervised-200000", argparse.Namespace(device=device, rounds=1))
        assert ("copy" in made) == expected


def test_works_share_a_line_about_what_they_were_measured_with():
    settings = [{"threads": 2, "environment": {"processor": name, "system": "Linux"}} for name in ("A", "B", "A")]
    found = dict(zip(("x", "y", "z"), settings, strict=True))
    assert measured_on(found) == ["Measured with 2 threads, processor A", "Measured with 2 threads, processor B: y"]


@pytest.mark.slow
def test_work_of_another_process_reports_no_memory():
    command = [sys.executable, "-m", "experiments.benchmarks.worker", "import", "selfsup-xbn --help", "cpu", "1", "1"]
    done = subprocess.run(command, input="go\n", check=True, text=True, stdout=subprocess.PIPE)
    ready, answer = done.stdout.splitlines()
    assert json.loads(ready) == {"ready": True}
    assert set(json.loads(answer)) == {"seconds"}


def test_table_has_dashes_for_memory_that_was_not_measured():
    rows = {"another": {"seconds": 1.0, "rounds": [1.0]}}
    rows["own"] = rows["another"] | {"extra_bytes": 0, "peak_bytes": 2**20}
    assert [line.split(" | ")[-2:] for line in work_table("", rows)[2:]] == [["-", "- |"], ["0 MB", "1 MB |"]]


def test_works_are_named_by_how_they_begin(tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(
        "experiments.benchmarks.__main__.measure",
        lambda work, options: (
            measured.append(work) or {name: {"seconds": 1.0, "rounds": [1.0]} for name in works()[work]}
        ),
    )
    benchmark(["memory-1", "memory-6", "memory-1000", "--out", str(tmp_path)])
    assert measured == ["memory-65536", "memory-1000000"]
    with pytest.raises(SystemExit):
        benchmark(["memory-1", "memories", "--out", str(tmp_path)])
    assert "expected the beginning of the name of a work, got 'memories'" in capsys.readouterr().err


def test_watch_adds_each_moment_to_one_part(monkeypatch):
    clock = itertools.count()  # each reading is a second after the one before
    monkeypatch.setattr(parts, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    watch = parts.Watch()
    inner = watch.function("inner", lambda: None)
    watch.function("outer", inner)()
    watch.enter("end")
    assert watch.seconds == {REST: 2, "outer": 2, "inner": 1}


SMALL = {
    step_parts: (
        ["--rows", "2048", "--batch", "8", "--dim", "32", "--steps", "9"],
        "step-parts-2048.json",
        step_parts.BARE,
    ),
    knn_parts: (["--scale", "0.02", "--rounds", "5"], "knn-parts.json", knn_parts.FAISS),
}


@pytest.mark.parametrize("module", SMALL)
def test_profile_has_every_part_of_a_work(module, tmp_path, capsys):
    options, name, beside = SMALL[module]
    module.main([*options, "--threads", "1", "--out", str(tmp_path)])
    names = {part.part for part in module.PARTS}
    assert set(json.loads((tmp_path / name).read_text())["milliseconds"]) == {*names, REST, ALL, beside}
    assert ALL in capsys.readouterr().out


def test_shares_of_a_loss_are_measured_for_each_number_of_processes(tmp_path, monkeypatch, capsys):
    sizes = {"BATCH": 16, "ROWS": 64, "DIM": 8, "CLASSES": 4, "COUNTS": (1, 4)}
    for name, value in sizes.items():
        monkeypatch.setattr(processes, name, value)
    processes.main(["shares", "--rounds", "2", "--out", str(tmp_path)])
    assert set(json.loads((tmp_path / "processes-shares.json").read_text())["measured"]) == {"1", "4"}
    assert json.loads(capsys.readouterr().out).keys() == {"1", "4"}


@pytest.mark.slow
def test_each_view_is_sent_to_one_process(monkeypatch):
    monkeypatch.setattr(processes, "SHUFFLED", (1, 1, 1))
    for count, share in processes.views().items():
        assert 0 < share < 1 / int(count)


SCALE = {"knn": 0.02, "recall": 0.03}


@pytest.fixture(scope="module")
def ours():
    return {work: peers["ours"](SCALE[work])() for work, peers in WORKS.items()}


@pytest.mark.parametrize(("work", "peer"), [(work, peer) for work in WORKS for peer in WORKS[work] if peer != "ours"])
def test_every_peer_gives_our_answer(work, peer, ours):
    try:
        run = WORKS[work][peer](SCALE[work])
    except ImportError as error:
        pytest.skip(str(error))
    assert run() == pytest.approx(ours[work])


def test_works_are_neither_trivial_nor_hopeless(ours):
    assert len(set(ours["knn"])) == 10
    assert 50 < ours["recall"][KS[0]] < ours["recall"][KS[1]] < 100
