"""The experiments' bookkeeping: names of run folders, results that grow run by run, committed results."""

from __future__ import annotations

import importlib
import json
import shlex
import statistics
from dataclasses import replace

import pytest

from experiments.runs import CONFIG, RESULTS, Experiment, folder_name, read, table
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.runs.results import settings

TINY = replace(RECIPES["digits"], limit_train=128, epochs=2, batch_size=32, queue_size="64", dim=16, drift_every=0)
CELLS = {name: replace(TINY, adaptation=name) for name in ("xbm", "xbn")}
COMMITTED = {  # results file: its module, and the epoch whose values the module shows (0: the last one of each cell)
    "beyond-cars196": ("beyond", 0),
    "beyond-glyphs": ("beyond", 0),
    "beyond-omniglot": ("beyond", 0),
    "cars196-small": ("cars196", 4),
    "digits": ("digits", 40),
    "drift_residual": ("drift_residual", 0),
    "fig1-small": ("fig1_sweeps", 3),
    "glyphs-supervise": ("glyphs", 2),
    "glyphs-pretrain": ("glyphs", 4),
    "fig2-small": ("fig2_moco", 8),
    "fig2-paper": ("fig2_moco", 20),
    "fig3-small": ("fig3_drift", 3),
    "momentum_ablation-small": ("momentum_ablation", 8),
    "omniglot": ("omniglot", 3),
    "table1-small": ("table1", 3),
    "table2-small": ("table2", 3),
    "table3-small": ("table3", 3),
}


def show_knn(results, path):
    return table(results, {"knn_top1": "k-NN"})


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The results file of an experiment named "tiny"."""
    monkeypatch.setattr("experiments.runs.RESULTS", tmp_path)
    return tmp_path / "tiny.json"


def test_folder_names_depend_on_what_changes_results():
    other = [replace(TINY, lr=0.01), replace(TINY, data="cifar10"), replace(TINY, adaptation="xbm")]
    same = [replace(TINY, **change) for change in ({"seed": 5}, {"device": "cpu"}, {"out": "there"}, {"workers": 0})]
    assert {folder_name(config, 0) for config in same} == {folder_name(TINY, 0)}
    assert len({folder_name(config, 0) for config in [TINY, *other]} | {folder_name(TINY, 1)}) == 5


def write_run(folder, accuracies, seconds=None):
    """Write what a run leaves: its settings, a record an epoch, and its seconds if it is finished."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"environment": {"python": "3"}}))
    records = [{"epoch": epoch, "step": 4 * epoch, "knn_top1": value} for epoch, value in enumerate(accuracies, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if seconds:
        (folder / "seconds.txt").write_text(f"{seconds}\n")


def test_results_are_means_of_the_collected_runs(tmp_path, results, capsys):
    experiment = Experiment("tiny", "", {"": CELLS}, show_knn)
    collect = ["--collect", "--folder", str(tmp_path / "runs"), "--seeds", "2"]
    write_run(tmp_path / "runs" / folder_name(CELLS["xbn"], 0), [50.0, 60.0], seconds=7)
    experiment.main(collect)
    assert [result["label"] for result in read(results)] == ["xbn"]
    write_run(tmp_path / "runs" / folder_name(CELLS["xbn"], 1), [70.0])  # unfinished
    write_run(tmp_path / "runs" / folder_name(CELLS["xbm"], 0), [10.0], seconds=7)
    experiment.main(collect)
    xbm, xbn = read(results)
    assert (xbm["label"], list(xbm["seeds"])) == ("xbm", ["0"])
    assert xbn["history"]["0"]["knn_top1"] == {"1": 50.0, "2": 60.0}
    assert xbn["mean"]["knn_top1"] == 65
    assert xbn["std"]["knn_top1"] == pytest.approx(statistics.stdev([60, 70]), abs=1e-3)
    assert [xbn["seeds"][seed]["seconds"] for seed in "01"] == [7, 0]
    capsys.readouterr()
    experiment.main(["--from-results"])
    assert "| xbn | 65.00 ± 7.07 | 2 |" in capsys.readouterr().out


def test_changed_cell_does_not_mix_with_runs_of_the_old_one(tmp_path, results):
    for cells in (CELLS, {"xbn": replace(CELLS["xbn"], lr=0.01)}):
        write_run(tmp_path / "runs" / folder_name(cells["xbn"], 0), [50.0], seconds=1)
        Experiment("tiny", "", {"": cells}, show_knn).main(["--collect", "--folder", str(tmp_path / "runs")])
        (result,) = read(results)
        assert result["config"]["lr"] == cells["xbn"].lr
        assert list(result["seeds"]) == ["0"]


@pytest.mark.slow
def test_finished_runs_are_not_repeated(tmp_path, results):
    experiment = Experiment("tiny", "", {"": CELLS}, show_knn)
    arguments = ["--folder", str(tmp_path / "runs"), "--jobs", "1"]
    experiment.main([*arguments, "--seeds", "1", "--only", "xbn"])
    assert [result["label"] for result in read(results)] == ["xbn"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
    assert len(before) == 1
    experiment.main([*arguments, "--seeds", "1"])
    assert [(result["label"], list(result["seeds"])) for result in read(results)] == [("xbm", ["0"]), ("xbn", ["0"])]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_every_experiment_has_committed_results():
    modules = {path.stem for path in RESULTS.parent.glob("*.py") if "    Experiment(" in path.read_text()}
    assert modules == {module for module, _ in COMMITTED.values()}


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_results_are_consistent_and_shown(name, tmp_path, pictures):
    module, epoch = COMMITTED[name]
    cells = json.loads((RESULTS / f"{name}.json").read_text())
    module = importlib.import_module(f"experiments.{module}")
    configs = module.SCALES[name.rpartition("-")[2]] if hasattr(module, "SCALES") else module.CELLS
    for cell in cells:
        assert cell["config"] == settings(configs[cell["label"]])
        for key, mean in cell["mean"].items():
            values = [seed[key] for seed in cell["seeds"].values() if seed.get(key) is not None]
            assert mean == pytest.approx(statistics.mean(values), abs=1e-3)
    printed = "\n".join(module.show(cells, tmp_path / f"{name}.json"))
    key = "knn_top1" if "knn_top1" in cells[0]["mean"] else "recall@1"
    for cell in cells:
        shown = str(epoch or cell["config"].get("head_epochs", 0) + cell["config"]["epochs"])
        values = [history[key][shown] for history in cell["history"].values()]
        mean, deviation = round(statistics.mean(values), 4), round(statistics.stdev(values), 4)  # as in the file
        assert f"{mean:.2f} ± {deviation:.2f}" in printed


def test_only_without_a_matching_cell_is_refused(capsys):
    with pytest.raises(SystemExit):
        Experiment("tiny", "", {"": CELLS}, lambda results, path: []).main(["--only", "XBN"])
    assert "expected a part of a label out of ['xbm', 'xbn'], got 'XBN'" in capsys.readouterr().err


def test_printed_commands_name_the_given_data(capsys):
    experiment = Experiment("tiny", "", {"": CELLS}, lambda results, path: [])
    experiment.main(["--commands", "--data", f"{CELLS['xbn'].data}=folder:/a b"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[::2] == [f"# {label}" for label in CELLS]
    for words in map(shlex.split, printed[1::2]):
        assert words[words.index("--data") + 1] == "folder:/a b"


def test_missing_result_is_named(results, capsys):
    with pytest.raises(SystemExit):
        Experiment("tiny", "", {"": CELLS}, lambda results, path: []).main(["--from-results"])
    assert "no results in" in capsys.readouterr().err
