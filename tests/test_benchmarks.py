from __future__ import annotations

import pytest

from experiments.benchmarks.evaluators import KS, WORKS

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
