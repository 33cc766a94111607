"""A few cases of the campaign of damaged input, and what its verdict detects."""

import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfsup_xbn.errors import UserError
from tests.fixtures import without_checks
from tests.robustness import bad_input
from tests.robustness.bad_input_target import Target
from tests.robustness.bad_input_targets import TARGETS


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    with without_checks():
        bad_input.write_targets(folder)
    return folder


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_damaged_input_ends_in_a_result_or_one_line(targets, name, rng):
    with without_checks():
        case = bad_input.case(targets, name, rng)
    assert case["end"] != "failed", case["reason"]


@pytest.mark.slow
def test_campaign_reaches_every_reader_and_both_ends(tmp_path, unchecked):
    cases = bad_input.campaign(tmp_path, seed=1, cases=70)
    assert {case["target"] for case in cases} == set(TARGETS)
    assert [case for case in cases if case["end"] == "failed"] == []
    ends = [case["end"] for case in cases]
    assert min(ends.count("read"), ends.count("refused")) > 7


ROWS = 3


def loses_a_row(folder):
    return ROWS - 1


def hangs(folder):
    time.sleep(2)
    return ROWS


def crashes(folder):
    return {}["rows"]


class RawError(UserError):
    def __str__(self):
        return self.message


def complains_twice(folder):
    error = RawError("")
    error.message = "one\ntwo"
    raise error


def rings_the_bell(folder):
    error = RawError("")
    error.message = "one\x07"
    raise error


def refuses(folder):
    raise UserError("one")


@pytest.mark.parametrize(
    ("read", "end"),
    [
        (lambda folder: ROWS, "read"),
        (refuses, "refused"),
        (loses_a_row, "failed"),
        (hangs, "failed"),
        (crashes, "failed"),
        (complains_twice, "failed"),
        (rings_the_bell, "failed"),
    ],
)
def test_verdict_sees_lost_rows_hangs_and_tracebacks(tmp_path, read, end):
    target = Target(lambda folder: None, "*", read, lambda folder: ROWS)
    assert bad_input.verdict(target, tmp_path, seconds=0.5)[0] == end


def test_at_least_half_of_the_changes_change_something():
    rng = random.Random(0)
    content = b"1 2 a/b.jpg\n3 4 c/d.jpg\n"
    assert sum(bad_input.spoil(content, rng) != content for _ in range(200)) > 100
