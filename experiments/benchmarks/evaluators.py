"""Works of the evaluators and their peers: weighted k-NN with the sizes of CIFAR, Recall@K with those of SOP.

``WORKS[work][name](scale)`` creates the inputs, which are equal for all implementations, and returns a function that
performs the work once: building an index, searching and voting. A peer is imported when its function is called, which
raises ImportError if the peer is not installed.

Sizes at scale 1: k-NN of 10,000 queries in a bank of 50,000 rows, D 512, k 200, 10 classes; Recall@1/10/100/1000 among
60,502 images of 11,316 classes, D 512.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Work = Callable[[float], Callable[[], Any]]

DIM, CLASSES, K, TEMPERATURE = 512, 10, 200, 0.1
KS = (1, 10, 100, 1000)


def clusters(rows: int, classes: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit float32 features [rows, DIM] around a center for each class, and int64 labels [rows]."""
    centers = np.random.default_rng(0).standard_normal((classes, DIM), dtype=np.float32)
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(rows) % classes)
    features = random.standard_normal((rows, DIM), dtype=np.float32)
    features *= noise
    features += centers[labels]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features, labels


def knn_inputs(scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return queries [N, D], bank [G, D] and labels of the bank [G]. The accuracy of k-NN is about 90 %."""
    queries, _ = clusters(round(10_000 * scale), CLASSES, noise=9.0, seed=1)
    return queries, *clusters(round(50_000 * scale), CLASSES, noise=9.0, seed=2)


def recall_inputs(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return features [N, D] and labels [N]. Recall@1 is about 50 %."""
    return clusters(round(60_502 * scale), round(11_316 * scale), noise=2.5, seed=3)


def knn_ours(scale: float) -> Callable[[], list[int]]:
    """Return weighted k-NN of this package."""
    import torch

    from selfsup_xbn.evaluation import knn_classify

    queries, bank, labels = map(torch.from_numpy, knn_inputs(scale))
    return lambda: knn_classify(queries, bank, labels, CLASSES, K, TEMPERATURE).tolist()


def knn_faiss(scale: float) -> Callable[[], list[int]]:
    """Return weighted k-NN with an exact index of faiss."""
    import faiss

    queries, bank, labels = knn_inputs(scale)

    def run() -> list[int]:
        index = faiss.IndexFlatIP(DIM)
        index.add(bank)
        similarities, nearest = index.search(queries, K)
        ballot = np.arange(len(queries))[:, None] * CLASSES + labels[nearest]
        weights = np.exp(similarities / TEMPERATURE)
        votes = np.bincount(ballot.ravel(), weights.ravel(), minlength=len(queries) * CLASSES)
        return votes.reshape(-1, CLASSES).argmax(1).tolist()

    return run


def knn_lightly(scale: float) -> Callable[[], list[int]]:
    """Return weighted k-NN of lightly, in chunks of 512 queries."""
    import torch
    from lightly.utils.benchmarking.knn import knn_predict

    queries, bank, labels = map(torch.from_numpy, knn_inputs(scale))

    def run() -> list[int]:
        predictions = [
            knn_predict(chunk, bank.T, labels, CLASSES, K, TEMPERATURE)[:, 0] for chunk in queries.split(512)
        ]
        return torch.cat(predictions).tolist()

    return run


def knn_sklearn(scale: float) -> Callable[[], list[int]]:
    """Return weighted k-NN of scikit-learn with brute-force search."""
    from sklearn.neighbors import KNeighborsClassifier

    queries, bank, labels = knn_inputs(scale)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / TEMPERATURE)

    def run() -> list[int]:
        classifier = KNeighborsClassifier(K, weights=weights, metric="cosine", algorithm="brute")
        return classifier.fit(bank, labels).predict(queries).tolist()

    return run


def recall_ours(scale: float) -> Callable[[], dict[int, float]]:
    """Return Recall@K of this package."""
    import torch

    from selfsup_xbn.evaluation import recall_at_k

    features, labels = map(torch.from_numpy, recall_inputs(scale))
    return lambda: recall_at_k(features, labels, ks=KS)


def recall_faiss(scale: float) -> Callable[[], dict[int, float]]:
    """Return Recall@K with an exact index of faiss."""
    import faiss

    features, labels = recall_inputs(scale)

    def run() -> dict[int, float]:
        index = faiss.IndexFlatIP(DIM)
        index.add(features)
        nearest = index.search(features, min(max(KS) + 1, len(features)))[1][:, 1:]  # the first is the query itself
        hits = labels[nearest] == labels[:, None]
        return {k: 100 * float(hits[:, :k].any(1).mean()) for k in KS}

    return run


def recall_pml(scale: float) -> Callable[[], dict[int, float]]:
    """Return Recall@K of PyTorch Metric Learning."""
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    class RecallCalculator(AccuracyCalculator):
        """AccuracyCalculator with Recall@K, added as its documentation describes."""

        def calculate_recall(self, knn_labels: Any, query_labels: Any, **kwargs: Any) -> dict[int, float]:
            hits = knn_labels == query_labels[:, None]
            return {k: 100 * hits[:, :k].any(1).double().mean().item() for k in KS}

        def requires_knn(self) -> list[str]:
            return [*super().requires_knn(), "recall"]

    features, labels = map(torch.from_numpy, recall_inputs(scale))
    k = min(max(KS), len(features) - 1)
    calculator = RecallCalculator(include=("recall",), k=k, device=torch.device("cpu"))
    return lambda: calculator.get_accuracy(features, labels)["recall"]


WORKS: dict[str, dict[str, Work]] = {
    "knn": {"ours": knn_ours, "faiss-cpu": knn_faiss, "lightly": knn_lightly, "scikit-learn": knn_sklearn},
    "recall": {"ours": recall_ours, "faiss-cpu": recall_faiss, "pytorch-metric-learning": recall_pml},
}
