from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch.nn.functional import normalize

from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation import neighbors, recall_at_k, retrieval_metrics
from selfsup_xbn.evaluation.neighbors import CHUNK

KS = (1, 2, 5, 10, 1000)


def brute_force(queries, labels, gallery=None, gallery_labels=None, ks=KS):
    """The definitions, literally, in float64: sort the gallery for each query, the other classes first in ties."""
    same_set = gallery is None
    gallery, gallery_labels = (queries, labels) if same_set else (gallery, gallery_labels)
    unit = lambda x: normalize(x.double(), dim=1).numpy()  # noqa: E731
    similarity = unit(queries) @ unit(gallery).T
    hits = []
    for i, row in enumerate(similarity):
        relevant = (gallery_labels == labels[i]).numpy()
        order = [j for j in np.lexsort((relevant, -row.round(9))) if not (same_set and j == i)]
        if relevant[order].any():
            hits.append(relevant[order])
    result = {f"recall@{k}": np.mean([hit[:k].any() for hit in hits]) for k in ks}
    result["r_precision"] = np.mean([hit[: hit.sum()].mean() for hit in hits])
    result["map@r"] = np.mean([average_precision_at_r(hit) for hit in hits])
    return {name: 100 * value for name, value in result.items()}


def average_precision_at_r(hit):
    r = hit.sum()
    return sum(hit[:i].mean() for i in range(1, r + 1) if hit[i - 1]) / r


def gaussian(count, classes, seed, dim=8, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centers[labels] + spread * torch.randn(count, dim, generator=generator), labels * 7 - 20


def tied(count, classes, seed, dim=6):
    """Rows of four entries of +-1/2: all similarities are multiples of 1/4 in any precision, so most are ties."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (count, dim), generator=generator) - 0.5
    kept = torch.rand(count, dim, generator=generator).topk(4, dim=1).indices
    features = torch.zeros(count, dim).scatter(1, kept, signs.gather(1, kept))
    return features, torch.randint(classes, (count,), generator=generator)


def sides(make, same_set, seed):
    """Singletons, classes that only one side holds, and large classes among them."""
    queries, labels = make(173, 60, seed)
    labels[:40] = labels[0]
    return (queries, labels) if same_set else (queries, labels, *make(211, 45, seed + 1000))


@pytest.mark.parametrize("same_set", [True, False], ids=["same set", "query and gallery"])
@pytest.mark.parametrize("make", [gaussian, tied])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_brute_force_matrix(make, same_set, seed):
    given = sides(make, same_set, seed)
    expected = brute_force(*given)
    assert retrieval_metrics(*given, ks=KS) == pytest.approx(expected, abs=1e-9)
    assert recall_at_k(*given, ks=KS) == pytest.approx({k: expected[f"recall@{k}"] for k in KS}, abs=1e-9)
    assert 0 < expected["r_precision"] < expected["recall@10"] < 100


@pytest.mark.parametrize("same_set", [True, False], ids=["same set", "query and gallery"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_pytorch_metric_learning(same_set, seed):
    given = sides(gaussian, same_set, seed)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(
        include=names, k="max_bin_count", device=torch.device("cpu"), knn_func=CustomKNN(CosineSimilarity())
    )
    peer = calculator.get_accuracy(*given)
    ours = retrieval_metrics(*given, ks=(1,))
    assert list(ours.values()) == pytest.approx([100 * peer[name] for name in names])


@pytest.mark.parametrize("budget", [1, 500, 5000])
@pytest.mark.parametrize("same_set", [True, False])
def test_block_size_does_not_change_the_answer(budget, same_set, monkeypatch):
    given = sides(tied, same_set, 5)
    expected = retrieval_metrics(*given, ks=KS)
    monkeypatch.setattr(neighbors, "BLOCK", budget)
    assert retrieval_metrics(*given, ks=KS) == expected


@pytest.mark.parametrize("chunk", [16, 48, 1000])
@pytest.mark.parametrize("same_set", [True, False], ids=["same set", "query and gallery"])
@pytest.mark.parametrize("make", [gaussian, tied])
def test_metrics_equal_brute_force_with_ties_across_chunks(make, same_set, chunk, monkeypatch):
    given = sides(make, same_set, 7)
    expected = brute_force(*given)
    monkeypatch.setattr(neighbors, "CHUNK", chunk)
    assert int(given[1].unique(return_counts=True)[1].max()) > 40  # the largest class spans chunks of 16
    assert retrieval_metrics(*given, ks=KS) == pytest.approx(expected, abs=1e-9)
    assert recall_at_k(*given, ks=KS) == pytest.approx({k: expected[f"recall@{k}"] for k in KS}, abs=1e-9)


def test_duplicates_of_any_values_tie_across_chunks():
    """Each point is in the gallery once for each of 4 classes, so each match ties with the 3 others of its point."""
    points, classes = torch.randn(CHUNK // 2, 33), torch.arange(4)
    gallery, labels = points.repeat_interleave(4, dim=0), classes.repeat(len(points))
    recalls = recall_at_k(points.repeat(4, 1), classes.repeat_interleave(len(points)), gallery, labels, ks=(1, 3, 4))
    assert recalls == {1: 0, 3: 0, 4: 100}


def test_order_of_the_rows_does_not_change_the_answer():
    queries, labels = sides(tied, True, 6)
    order = torch.randperm(len(labels))
    expected = retrieval_metrics(queries, labels, ks=KS)
    assert retrieval_metrics(queries[order], labels[order], ks=KS) == pytest.approx(expected, abs=1e-9)


def test_collapsed_encoder_scores_zero():
    collapsed = torch.randn(1, 33).expand(500, -1).clone()
    labels = torch.arange(500) % 50
    assert retrieval_metrics(collapsed, labels, ks=(1, 100)) == {
        "recall@1": 0, "recall@100": 0, "r_precision": 0, "map@r": 0,
    }  # fmt: skip
    assert recall_at_k(collapsed, labels, ks=(490, 491)) == {490: 0, 491: 100}  # after the 490 of other classes


def test_only_the_query_itself_is_left_out_not_its_duplicates():
    features = torch.eye(3)[[0, 0, 1, 1, 2, 2]]
    assert recall_at_k(features, torch.tensor([0, 0, 1, 1, 2, 2])) == {1: 100, 10: 100}
    assert recall_at_k(features, torch.tensor([0, 1, 1, 2, 2, 0]), ks=(1,)) == {1: 0}


def test_gallery_equal_to_the_queries_does_not_leave_them_out():
    features, labels = gaussian(50, 10, 7)
    assert recall_at_k(features, labels, features, labels, ks=(1,)) == {1: 100}
    assert recall_at_k(features, labels, ks=(1,))[1] < 100


def test_queries_without_a_match_do_not_count():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.99, 0.01]])
    labels = torch.tensor([0, 0, 1])  # row 2 has no match, and stands between rows 0 and 1
    assert recall_at_k(features, labels, ks=(1, 2)) == {1: 0, 2: 100}


def test_lengths_precisions_and_label_types_are_free():
    features, labels = gaussian(100, 10, 8)
    expected = recall_at_k(features, labels)
    assert recall_at_k(features.double() * 1000, labels.int(), ks=[1, 10]) == expected
    given = (features.half(), labels.int(), features, labels)
    assert recall_at_k(*given, ks=(1,)) == {1: 100}


FEATURES, LABELS = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("metric", [recall_at_k, retrieval_metrics])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((FEATURES, LABELS[:5]), "one label per query, got 5 labels for 6"),
        ((FEATURES, LABELS, FEATURES), "both gallery and gallery_labels or neither"),
        ((FEATURES, LABELS, FEATURES[:, :3], LABELS), "the same number of dimensions, got 4 and 3"),
        ((FEATURES, LABELS, FEATURES, LABELS[:2]), "one label per gallery row, got 2 labels for 6"),
        ((FEATURES, LABELS, FEATURES, LABELS + 10), "at least one query with a match"),
        ((FEATURES, torch.arange(6)), "at least one query with a match"),
        ((FEATURES[:0], LABELS[:0]), "at least one row, got none"),
        ((FEATURES * torch.nan, LABELS), "got norm nan in row 0"),
        ((FEATURES, LABELS, None, None, (1, 0)), r"every K to be at least 1, got \[1, 0\]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_in_one_line_with_the_value(metric, given, message):
    with pytest.raises(UserError, match=message) as caught:
        metric(*given)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------- a gallery that includes the queries


@pytest.mark.parametrize("make", [gaussian, tied])
def test_queries_in_the_gallery_are_left_out_of_their_own_ranking(make):
    rows, labels = make(120, 25, 3)
    order = torch.randperm(120)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(120))
    gallery = rows[order], labels[order]
    expected = brute_force(rows, labels)  # every row is a query, and the gallery is the queries
    found = retrieval_metrics(rows, labels, *gallery, ks=KS, self_indices=place)
    assert found == pytest.approx(expected, abs=1e-9)
    assert found == pytest.approx(retrieval_metrics(rows, labels, ks=KS), abs=1e-9)
    assert recall_at_k(rows, labels, *gallery, ks=(1,))[1] > found["recall@1"]  # with each query as its own match

    some = slice(0, 50)  # 50 queries, 30 of which are in the gallery of 70 others
    gallery = torch.cat([rows[50:], rows[:30]]), torch.cat([labels[50:], labels[:30]])
    own = torch.cat([70 + torch.arange(30), torch.full((20,), -1)])
    parts = []
    for i in range(50):
        kept = torch.arange(100) != own[i]
        if (gallery[1][kept] == labels[i]).any():
            parts.append(brute_force(rows[i : i + 1], labels[i : i + 1], gallery[0][kept], gallery[1][kept]))
    found = retrieval_metrics(rows[some], labels[some], *gallery, ks=KS, self_indices=own)
    assert found == pytest.approx({name: np.mean([part[name] for part in parts]) for name in found}, abs=1e-9)
    assert recall_at_k(rows[some], labels[some], *gallery, ks=(1,), self_indices=own.int())[1] == found["recall@1"]


@pytest.mark.usefixtures("unchecked")
def test_own_rows_that_do_not_fit_are_named():
    rows, labels = gaussian(12, 3, 0)
    with pytest.raises(UserError, match="gallery with self_indices"):
        recall_at_k(rows, labels, self_indices=torch.arange(12))
    for own in (torch.arange(11), torch.arange(12) + 1, torch.arange(12) - 2, torch.arange(12)[:, None]):
        with pytest.raises(UserError, match=r"self_indices of shape \[12\] in \[-1, 12\)"):
            recall_at_k(rows, labels, rows, labels, self_indices=own)
    for features in (rows[0], rows[None]):
        with pytest.raises(UserError, match="features of shape"):
            recall_at_k(features, labels)
