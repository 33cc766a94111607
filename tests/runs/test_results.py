"""Statistics of a comparison, against numpy and scipy, and its results file."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from selfsup_xbn.config.modes import PretrainConfig
from selfsup_xbn.errors import UserError
from selfsup_xbn.runs.results import add, course, difference, read


def cell(values, key="knn_top1", history=None):
    seeds = {str(seed): {key: value} for seed, value in values.items()}
    return {"label": "a", "seeds": seeds, "history": history or {}}


def test_paired_difference_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    one, other = 90 + rng.normal(size=(2, 6))
    paired = difference(cell(dict(enumerate(one))), cell(dict(enumerate(other))), "knn_top1")
    expected = stats.ttest_rel(one, other)
    assert paired.mean == pytest.approx((one - other).mean())
    assert paired.error == pytest.approx(stats.sem(one - other))
    assert paired.mean / paired.error == pytest.approx(expected.statistic)
    assert paired.seeds == 6


def test_only_seeds_of_both_cells_are_paired():
    one, other = cell({0: 5.0, 1: 7.0, 3: None}), cell({1: 4.0, 2: 1.0, 3: 2.0})
    assert difference(one, other, "knn_top1") == (3.0, None, 1)
    assert difference(one, cell({2: 1.0}), "knn_top1") is None
    assert difference(one, other, "loss") is None


def test_course_has_the_epochs_that_all_seeds_measured():
    history = {
        "0": {"knn_top1": {"1": 10.0, "2": 20.0, "10": 30.0}},
        "1": {"knn_top1": {"1": 12.0, "2": None, "10": 34.0}},
    }
    epochs, means, deviations = course(cell({}, history=history), "knn_top1")
    assert epochs == [1, 10]
    assert means == [11, 32]
    assert deviations == pytest.approx([np.std([10, 12], ddof=1), np.std([30, 34], ddof=1)])


def test_results_file_keeps_the_order_of_the_cells(tmp_path):
    path, cells = (
        tmp_path / "new" / "results.json",
        {name: PretrainConfig(dim=dim) for name, dim in (("a", 8), ("b", 16))},
    )
    run = {"records": [{"epoch": 1, "knn_top1": 40.0}], "seconds": 2.0, "environment": {}}
    for label, seed in (("b", 0), ("a", 1), ("a", 0)):
        add(path, cells, label, seed, run | {"records": [{"epoch": 1, "knn_top1": 40.0 + 10 * seed}]})
    a, b = read(path)
    assert (a["label"], list(a["seeds"]), b["label"]) == ("a", ["0", "1"], "b")
    assert a["mean"]["knn_top1"] == 45
    assert a["std"]["knn_top1"] == pytest.approx(np.std([40, 50], ddof=1), abs=1e-4)
    add(path, {"b": cells["b"]}, "b", 0, run)
    assert [result["label"] for result in read(path)] == ["b"]


@pytest.mark.parametrize("text", ["", "[", "{}x", '[{"label": 1}]', "[3]"])
def test_damaged_results_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="expected the results of a comparison"):
        read(tmp_path / "results.json")
