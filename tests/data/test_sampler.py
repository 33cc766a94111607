from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selfsup_xbn.data import ClassBalancedBatches, RandomBatches, seed_for
from selfsup_xbn.errors import UserError


def test_seeds_differ_for_other_numbers_orders_and_counts():
    numbers = [(), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (1, 2, 0, 0), (2**32,), (0, 1), (1,), (-1,), (2**32 - 1,)]
    seeds = [seed_for(*group) for group in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [seed_for(*group) for group in numbers]


def test_random_batches_take_every_sample_once_but_the_rest():
    sampler = RandomBatches(103, 10)
    epoch = sampler.epoch(0, 0)
    assert epoch.shape == (len(sampler), 10) == (10, 10)
    assert len(epoch.unique()) == 100
    assert 0 <= epoch.min() <= epoch.max() < 103


@pytest.mark.parametrize(
    "sampler", [RandomBatches(60, 12), ClassBalancedBatches(torch.arange(60) % 7, 12, 4)], ids=["random", "balanced"]
)
def test_epoch_depends_on_seed_and_epoch_alone(sampler):
    first = sampler.epoch(3, 5)
    sampler.epoch(3, 6)
    torch.manual_seed(0)
    assert torch.equal(sampler.epoch(3, 5), first)
    assert not torch.equal(sampler.epoch(3, 6), first)
    assert not torch.equal(sampler.epoch(4, 5), first)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    per_class=st.integers(1, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_balanced_batches_hold_k_of_each_class_evenly(sizes, per_class, share, seed):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))] * 3 + 5
    widest = min(len(sizes), len(labels) // per_class)
    assume(widest > 0)
    width = 1 + int(share * (widest - 1))
    sampler = ClassBalancedBatches(labels, width * per_class, per_class)
    epoch = sampler.epoch(seed, 0)
    assert epoch.shape == (len(labels) // (width * per_class), width * per_class)
    visits = dict.fromkeys(labels.tolist(), 0)
    for batch in epoch:
        groups = batch.view(width, per_class)
        assert len(labels[groups[:, 0]].unique()) == width
        for group in groups:
            assert len(labels[group].unique()) == 1
            members = int((labels == labels[group[0]]).sum())
            if members >= per_class:  # smaller classes repeat
                assert len(group.unique()) == per_class
            visits[int(labels[group[0]])] += 1
    assert max(visits.values()) - min(visits.values()) <= 1


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="expected a batch size from 1 to 10, the number of training images, got 11"):
        RandomBatches(10, 11)
    with pytest.raises(UserError, match="training images, got 0"):
        RandomBatches(10, 0)
    with pytest.raises(UserError, match="multiple of the 4 images per class"):
        ClassBalancedBatches(torch.arange(40) % 10, 18, 4)
    remedy = "needs 5 classes, but the data set has 3: use --batch-size 12, or --images-per-class 10"
    with pytest.raises(UserError, match=remedy):  # 7, 8 and 9 do not divide 20
        ClassBalancedBatches(torch.arange(40) % 3, 20, 4)
    ClassBalancedBatches(torch.arange(40) % 3, 12, 4)
    ClassBalancedBatches(torch.arange(40) % 3, 20, 10)
