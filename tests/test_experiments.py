"""The experiments' bookkeeping: shared runs, results that grow run by run, verdicts of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shlex
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.benchmarks import knn_parts, step_parts
from experiments.benchmarks.__main__ import main as benchmark
from experiments.benchmarks.__main__ import measure, measured_on, ratio, verdict
from experiments.benchmarks.__main__ import table as work_table
from experiments.benchmarks.parts import ALL, REST
from experiments.benchmarks.works import GOALS, Goal, works
from experiments.runs import RESULTS, Experiment, folder_name, read, table
from selfsup_xbn.config.recipes import RECIPES

TINY = replace(RECIPES["digits"], limit_train=128, epochs=2, batch_size=32, queue_size=64, dim=16, drift_every=0)
CELLS = {name: replace(TINY, adaptation=name) for name in ("xbm", "xbn")}
FIGURES = [
    path.stem
    for path in (Path(__file__).parents[1] / "experiments").glob("*.py")
    if "Experiment(" in path.read_text() and path.stem != "runs"
]


def test_folder_names_depend_on_what_changes_results():
    other = [replace(TINY, lr=0.01), replace(TINY, data="cifar10"), replace(TINY, adaptation="xbm")]
    same = [
        replace(TINY, seed=5),
        replace(TINY, device="cpu"),
        replace(TINY, out="elsewhere"),
        replace(TINY, workers=0),
    ]
    assert {folder_name(config, 0) for config in same} == {folder_name(TINY, 0)}
    assert len({folder_name(config, 0) for config in [TINY, *other]} | {folder_name(TINY, 1)}) == 5


def test_results_grow_run_by_run_and_runs_that_are_done_are_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.runs.RESULTS", tmp_path)
    experiment = Experiment("tiny", "", {"": CELLS}, lambda results, path: table(results, {"knn_top1": "k-NN"}))
    arguments = ["--folder", str(tmp_path / "runs"), "--jobs", "1"]
    experiment.main([*arguments, "--seeds", "1", "--only", "xbn"])
    assert [result["label"] for result in read(tmp_path / "tiny.json")] == ["xbn"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
    experiment.main([*arguments, "--seeds", "2"])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    results = read(tmp_path / "tiny.json")
    assert [(result["label"], sorted(result["seeds"])) for result in results] == [
        ("xbm", ["0", "1"]),
        ("xbn", ["0", "1"]),
    ]
    values = [found["knn_top1"] for found in results[1]["seeds"].values()]
    assert results[1]["mean"]["knn_top1"] == pytest.approx(statistics.mean(values), abs=1e-3)
    assert results[1]["std"]["knn_top1"] == pytest.approx(statistics.stdev(values), abs=1e-3)
    assert list(results[1]["history"]["1"]["knn_top1"]) == ["1", "2"]
    capsys.readouterr()
    experiment.main(["--from-results"])
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} | 2 |" in capsys.readouterr().out

    # What a run that is not done has logged is taken in as well.
    folder = tmp_path / "runs" / folder_name(CELLS["xbm"], 1)
    (folder / "seconds.txt").unlink()
    (tmp_path / "tiny.json").unlink()
    experiment.main([*arguments, "--collect"])
    collected = {result["label"]: result for result in read(tmp_path / "tiny.json")}
    assert collected["xbn"] == results[1]
    assert collected["xbm"]["history"] == results[0]["history"]
    assert collected["xbm"]["seeds"]["1"]["seconds"] == 0

    # A cell with other settings starts anew; it does not mix with runs of the old ones.
    changed = replace(experiment, scales={"": {"xbn": replace(CELLS["xbn"], lr=0.01)}})
    changed.main([*arguments, "--seeds", "1"])
    assert [(result["label"], list(result["seeds"])) for result in read(tmp_path / "tiny.json")] == [("xbn", ["0"])]


@pytest.mark.parametrize("name", FIGURES)
def test_committed_results_are_consistent_and_shown(name, tmp_path, capsys, monkeypatch):
    module = importlib.import_module(f"experiments.{name}")
    for path in RESULTS.glob("*.json"):
        if path.stem.removesuffix("-small") not in (name, name.split("_")[0]) and path.stem != f"{name}-small":
            continue
        results = json.loads(path.read_text())
        for line in module.show(results, tmp_path / path.name):
            assert isinstance(line, str)
        for result in results:
            for key, mean in result["mean"].items():
                values = [found[key] for found in result["seeds"].values() if found.get(key) is not None]
                assert math.isclose(mean, statistics.mean(values), abs_tol=1e-3)


def test_printed_commands_name_the_given_data(capsys):
    experiment = Experiment("tiny", "", {"": CELLS}, lambda results, path: [])
    experiment.main(["--commands", "--data", f"{CELLS['xbn'].data}=folder:/a b"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[::2] == [f"# {label}" for label in CELLS]
    for words in map(shlex.split, printed[1::2]):
        assert words[words.index("--data") + 1] == "folder:/a b"


def test_missing_result_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.runs.RESULTS", tmp_path)
    with pytest.raises(SystemExit):
        Experiment("tiny", "", {"": CELLS}, lambda results, path: []).main(["--from-results"])
    assert "no results in" in capsys.readouterr().err


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


def test_memory_is_reported_only_for_a_works_own_process():
    command = [sys.executable, "-m", "experiments.benchmarks.worker", "import", "selfsup-xbn --help", "cpu", "1", "1"]
    done = subprocess.run(command, input="go\n", check=True, text=True, stdout=subprocess.PIPE)
    ready, answer = done.stdout.splitlines()
    assert json.loads(ready) == {"ready": True}
    assert set(json.loads(answer)) == {"seconds"}
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
    assert "no work's name begins with 'memories'" in capsys.readouterr().err


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
    found = json.loads((tmp_path / name).read_text())["milliseconds"]
    parts = {part.part for part in module.PARTS} | {REST}
    assert set(found) == parts | {ALL, beside}
    assert all(taken > 0 for taken in found.values())
    assert math.isclose(sum(found[part] for part in parts), found[ALL], rel_tol=0.3)
    assert ALL in capsys.readouterr().out
