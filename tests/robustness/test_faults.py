"""A few cases of the campaign of faults, and what its comparison detects."""

import pytest

from tests.finished_runs import differences
from tests.robustness import faults
from tests.robustness.killed_runs import run, run_arguments


def check(tmp_path, names, **numbers):
    cases = faults.campaign(tmp_path, seed=0, names=names, **numbers)
    assert len(cases) >= sum(numbers.values())
    assert [case for case in cases if not case["equal"]] == []


@pytest.mark.slow
def test_killed_and_damaged_runs_end_as_if_uninterrupted(tmp_path, unchecked):
    check(tmp_path, ["supervise axbn"], kills=2, damaged=1, full=1)


@pytest.mark.slow
def test_faults_of_several_configurations_change_no_run(tmp_path, unchecked):
    check(tmp_path, ["supervise axbn", "pretrain xbn, 2 workers", "supervise none"], kills=5, damaged=3, full=2)


@pytest.mark.slow
def test_comparison_of_runs_finds_another_seed_and_rate(tmp_path):
    argv = [*run_arguments(tmp_path)["supervise xbn"], "--epochs", "1", "--eval-every", "0"]
    for name, options in {"a": [], "b": [], "c": ["--seed", "1"], "d": ["--lr", "0.0011"]}.items():
        assert run([*argv, *options], tmp_path / name).code == 0
    assert differences(tmp_path / "a", tmp_path / "b") == []
    for other in "cd":
        names = differences(tmp_path / "a", tmp_path / other)
        assert {"metrics", "checkpoint.pt: .method.queue.rows"} <= set(names)
        assert any("encoder.backbone" in name for name in names)
    assert "checkpoint.pt: .random" in differences(tmp_path / "a", tmp_path / "c")
