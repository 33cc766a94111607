from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from lightly.utils.benchmarking.knn import knn_predict
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation import knn_classify, neighbors
from selfsup_xbn.evaluation.neighbors import CHUNK


def clustered(count, classes, dim, seed, spread=1.5):
    """Features around one center a class, of any length."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    features = centers[labels] + spread * torch.randn(count, dim, generator=generator)
    return features * (0.1 + torch.rand(count, 1, generator=generator)), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.07), (200, 1.0)])
def test_equals_scikit_learn_with_the_same_weights(k, temperature):
    (queries, _), (bank, labels) = clustered(300, 7, 16, 0), clustered(1003, 7, 16, 1)
    weights = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    reference = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")
    expected = reference.fit(bank.double().numpy(), labels.numpy()).predict(queries.double().numpy())
    predicted = knn_classify(queries, bank, labels, 7, k=k, temperature=temperature)
    assert predicted.tolist() == expected.tolist()
    assert 0.3 < (predicted == knn_classify(queries, bank, labels, 7, k=1000)).float().mean() < 1  # k matters here


def test_equals_lightly():
    (queries, _), (bank, labels) = clustered(200, 10, 32, 2), clustered(2500, 10, 32, 3)
    expected = knn_predict(normalize(queries), normalize(bank).T, labels, 10, knn_k=200, knn_t=0.1)[:, 0]
    assert torch.equal(knn_classify(queries, bank, labels, 10), expected)


@pytest.mark.parametrize("budget", [1, 3000, 40_000])
def test_block_size_does_not_change_the_answer(budget, monkeypatch):
    (queries, _), (bank, labels) = clustered(150, 5, 8, 4), clustered(400, 5, 8, 5)
    expected = knn_classify(queries, bank, labels, 5, k=30)
    monkeypatch.setattr(neighbors, "BLOCK", budget)
    assert torch.equal(knn_classify(queries, bank, labels, 5, k=30), expected)


@pytest.mark.parametrize("k", [30, CHUNK + 60])
def test_votes_equal_a_full_sort_across_chunks(k):
    (queries, _), (bank, labels) = clustered(150, 5, 8, 4), clustered(2 * CHUNK + 400, 5, 8, 5)
    similarities, nearest = (normalize(queries.double()) @ normalize(bank.double()).T).topk(k, dim=1)
    ballots = torch.nn.functional.one_hot(labels[nearest], 5) * (similarities / 0.1).exp()[:, :, None]
    assert torch.equal(knn_classify(queries, bank, labels, 5, k=k), ballots.sum(1).argmax(1))


def test_exclude_self_equals_leaving_each_row_out_of_the_bank(monkeypatch):
    monkeypatch.setattr(neighbors, "BLOCK", 700)
    bank, labels = clustered(60, 4, 6, 6)
    bank = torch.cat([bank, bank[:10]])  # a duplicate is a neighbor, only the row itself is not
    labels = torch.cat([labels, labels[:10].flip(0)])
    rest = [torch.arange(70) != i for i in range(70)]
    expected = [knn_classify(bank[[i]], bank[rest[i]], labels[rest[i]], 4, k=5) for i in range(70)]
    predicted = knn_classify(bank, bank, labels, 4, k=5, exclude_self=True)
    assert torch.equal(predicted, torch.cat(expected))
    assert not torch.equal(predicted, knn_classify(bank, bank, labels, 4, k=5))


def test_tiny_temperature_is_one_nearest_neighbor():
    (queries, _), (bank, labels) = clustered(100, 5, 8, 7), clustered(300, 5, 8, 8)
    nearest = labels[(normalize(queries.double()) @ normalize(bank.double()).T).argmax(1)]
    assert torch.equal(knn_classify(queries, bank, labels, 5, k=50, temperature=1e-6), nearest)


def test_k_above_the_bank_is_clamped_with_one_line_of_warning():
    (queries, _), (bank, labels) = clustered(20, 3, 4, 9), clustered(30, 3, 4, 10)
    with pytest.warns(UserWarning, match=r"^k=200 exceeds the 30 neighbors in the bank; using k=30$"):
        clamped = knn_classify(queries, bank, labels, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(clamped, knn_classify(queries, bank, labels, 3, k=30))
    with pytest.warns(UserWarning, match="using k=29"):
        knn_classify(bank, bank, labels, 3, exclude_self=True)


def test_half_precision_features_and_int32_labels_are_taken():
    (queries, _), (bank, labels) = clustered(50, 3, 8, 11, spread=0.1), clustered(80, 3, 8, 12, spread=0.1)
    expected = knn_classify(queries, bank, labels, 3, k=5)
    assert torch.equal(knn_classify(queries.bfloat16(), bank.bfloat16(), labels.int(), 3, k=5), expected)


def test_no_queries_give_no_predictions_only_by_error():
    with pytest.raises(UserError, match="queries: expected at least one row, got none"):
        knn_classify(torch.randn(0, 4), torch.randn(5, 4), torch.zeros(5, dtype=torch.int64), 1, k=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank": torch.ones(30, 5)}, "the same number of dimensions, got 4 and 5"),
        ({"labels": torch.zeros(29, dtype=torch.int64)}, "one label per bank row, got 29 labels for 30 rows"),
        ({"labels": torch.full((30,), 3)}, r"labels in \[0, 3\), got 3"),
        ({"labels": torch.full((30,), -1)}, r"labels in \[0, 3\), got -1"),
        ({"bank": torch.ones(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}, "at least 1 bank rows, got 0"),
        ({"bank": torch.full((30, 4), torch.nan)}, "bank: expected rows with a finite norm, got norm nan in row 0"),
        (
            {"queries": torch.full((20, 4), torch.inf)},
            "queries: expected rows with a finite norm, got norm inf in row 0",
        ),
        ({"k": 0}, "k >= 1 and temperature > 0, got k=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"exclude_self": True}, "with exclude_self, got 20 queries and 30 bank rows"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_in_one_line_with_the_value(change, message):
    given = {"queries": torch.ones(20, 4), "bank": torch.ones(30, 4), "labels": torch.zeros(30, dtype=torch.int64)}
    with pytest.raises(UserError, match=message) as caught:
        knn_classify(**({**given, "num_classes": 3, "k": 5} | change))
    assert "\n" not in str(caught.value)


def test_single_row_has_no_neighbor_but_itself():
    one, label = torch.ones(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match="at least 2 bank rows, got 1"):
        knn_classify(one, one, label, 1, k=1, exclude_self=True)
