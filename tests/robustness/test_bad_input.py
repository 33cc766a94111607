"""Input that was spoiled at random: a result or one line, and no row lost. The whole campaign is
``experiments/bad_input.py``."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import bad_input
from experiments.bad_input_targets import TARGETS, Target
from selfsup_xbn.errors import UserError


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    bad_input.write_targets(folder)
    return folder


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_spoiled_input_of_every_kind_ends_in_a_result_or_in_one_line(targets, name, rng):
    found = bad_input.case(targets, name, rng)
    assert found["end"] != "failed", found["reason"]


def test_the_campaign_reaches_every_reader_and_both_ends(tmp_path, unchecked):
    cases = bad_input.campaign(tmp_path, seed=1, cases=70)
    assert {case["target"] for case in cases} == set(TARGETS)
    assert [case for case in cases if case["end"] == "failed"] == []
    ends = [case["end"] for case in cases]
    assert min(ends.count("read"), ends.count("refused")) > 7


def lost(folder):
    return 2


def hangs(folder):
    time.sleep(9)


def crashes(folder):
    return {}["rows"]


def rambles(folder):
    raise UserError("one\ntwo")


@pytest.mark.parametrize("read", [lost, hangs, crashes, rambles])
def test_the_campaign_sees_lost_rows_hangs_tracebacks_and_errors_of_two_lines(tmp_path, monkeypatch, read):
    monkeypatch.setattr(bad_input, "SECONDS", 1)
    target = Target(lambda folder: None, "*", read, lambda folder: 3)
    assert bad_input.verdict(target, tmp_path)[0] == "failed"


def test_half_of_the_changes_at_least_change_something():
    rng = bad_input.random.Random(0)
    content = b"1 2 a/b.jpg\n3 4 c/d.jpg\n"
    assert sum(bad_input.spoil(content, rng) != content for _ in range(200)) > 100
