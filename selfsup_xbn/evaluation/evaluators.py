"""Evaluators of an encoder on a data set, by k-NN or retrieval, with raw pixels as a baseline.

Axis legend: N samples, G gallery images, D dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.config.parsing import parse_numbers
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data import ImageData, Split
from selfsup_xbn.evaluation._split_features import CHUNK, backbone_features, pixel_features
from selfsup_xbn.evaluation.features import extract_features
from selfsup_xbn.evaluation.knn import knn_classify
from selfsup_xbn.evaluation.retrieval import recall_at_k, retrieval_metrics
from selfsup_xbn.models.encoder import Encoder


@runtime_checkable
class Evaluator(Protocol):
    """Evaluator of encoders on a data set. It is created once and called after each epoch. Its metrics are in percent.

    Attributes:
        main: The name of the metric by which encoders are compared.
    """

    main: str

    @classmethod
    def from_config(cls, config: Config, data: ImageData, device: torch.device) -> Evaluator:
        """Return the evaluator of a run.

        Args:
            config: The settings of the run.
            data: The data set.
            device: The device of the encoder.
        """
        ...

    @classmethod
    def title(cls, config: Config) -> str:
        """Return the title of a table: the metric and the data set."""
        ...

    def encoder(self, encoder: Encoder) -> dict[str, float]:
        """Return the metrics of an encoder by name."""
        ...

    def raw_pixels(self) -> dict[str, float]:
        """Return the metrics of raw pixels by name."""
        ...


def baselines(evaluator: Evaluator, untrained: Encoder) -> dict[str, float]:
    """Return the metrics of raw pixels and of an untrained encoder, as ``NAME_raw_pixels`` and ``NAME_untrained``.

    Args:
        evaluator: The evaluator.
        untrained: The encoder.

    Example:
        >>> from selfsup_xbn.data import load_data
        >>> from selfsup_xbn.models.encoder import build_encoder
        >>> evaluator = KnnEvaluator(load_data("digits"))
        >>> sorted(baselines(evaluator, build_encoder("convnet4", 16, channels=1, image_size=8)))
        ['knn_top1_backbone_untrained', 'knn_top1_raw_pixels', 'knn_top1_untrained']
    """
    pixels = {f"{name}_raw_pixels": value for name, value in evaluator.raw_pixels().items()}
    return pixels | {f"{name}_untrained": value for name, value in evaluator.encoder(untrained).items()}


class KnnEvaluator:
    """Measure the top-1 accuracy of weighted k-NN on the test images, in percent.

    The bank is the training set. If the test classes are not among the training classes, the bank is the gallery. If
    there is no gallery either, it is the test set without the query.

    Args:
        data: The data set.
        k: The number of neighbors, as in ``knn_classify``.
        temperature: The temperature of the weights, as in ``knn_classify``.
        device: The device of the encoder.
        workers: The number of processes that read image files.

    Example:
        >>> from selfsup_xbn.data import load_data
        >>> list(KnnEvaluator(load_data("digits"), k=20).raw_pixels())
        ['knn_top1']
    """

    main = "knn_top1"

    def __init__(
        self,
        data: ImageData,
        *,
        k: int = 200,
        temperature: float = 0.1,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        self.data, self.temperature = data, temperature
        self.device, self.workers = torch.device(device), workers
        self.bank = (data.gallery or data.test) if data.disjoint else data.train
        self.self_search = self.bank is data.test
        self.k = min(k, len(self.bank) - self.self_search)
        if self.k < k:
            warnings.warn(f"k-NN: k={k} exceeds the {self.k} neighbors in the bank; using k={self.k}", stacklevel=2)

    @classmethod
    def from_config(cls, config: Config, data: ImageData, device: torch.device) -> KnnEvaluator:
        """Return the evaluator of a run, with ``knn_k`` and ``knn_temperature`` of the config."""
        return cls(data, k=config.knn_k, temperature=config.knn_temperature, device=device, workers=config.workers)

    @classmethod
    def title(cls, config: Config) -> str:
        """Return the title of a table: the metric and the data set."""
        return f"k-NN on {config.data}, k {config.knn_k}, T {config.knn_temperature:g}"

    def raw_pixels(self) -> dict[str, float]:
        """Return the accuracy of raw pixels."""
        pixels = [pixel_features(split, self.workers).to(self.device) for split in self._splits()]
        return {"knn_top1": self._top1(*pixels)}

    def encoder(self, encoder: Encoder) -> dict[str, float]:
        """Return the accuracy of the projection (``knn_top1``) and of the backbone (``knn_top1_backbone``)."""
        features = [backbone_features(encoder, split, self.data, self.device, self.workers) for split in self._splits()]
        projections = [extract_features(encoder.head, iter(rows.split(CHUNK))) for rows in features]
        return {"knn_top1": self._top1(*projections), "knn_top1_backbone": self._top1(*features)}

    def _splits(self) -> list[Split]:
        return [self.data.test] if self.self_search else [self.data.test, self.bank]

    def _top1(self, queries: Tensor, bank: Tensor | None = None) -> float:
        labels = self.bank.labels
        predicted = knn_classify(
            queries,
            queries if bank is None else bank,
            labels.to(queries.device),
            self.data.num_classes,
            k=self.k,
            temperature=self.temperature,
            exclude_self=bank is None,
        )
        return 100 * (predicted.cpu() == self.data.test.labels).double().mean().item()


class FeatureEvaluator:
    """Base class of evaluators whose metrics are functions of the embeddings of the test images and the gallery.

    A subclass sets ``main`` and implements ``measure``. Tables and plots show the metrics that are listed in
    ``METRICS``.

    Args:
        data: The data set.
        device: The device of the encoder.
        workers: The number of processes that read image files.
    """

    main: str

    def __init__(self, data: ImageData, *, device: torch.device | str = "cpu", workers: int = 0) -> None:
        self.data, self.device, self.workers = data, torch.device(device), workers

    @classmethod
    def from_config(cls, config: Config, data: ImageData, device: torch.device) -> FeatureEvaluator:
        """Return the evaluator of a run."""
        return cls(data, device=device, workers=config.workers)

    @classmethod
    def title(cls, config: Config) -> str:
        """Return the title of a table: the metric and the data set."""
        return f"{cls.main} on {config.data}"

    def measure(
        self,
        queries: Float[Tensor, "N D"],
        labels: Int64[Tensor, "N"],
        gallery: Float[Tensor, "G D"] | None = None,
        gallery_labels: Int64[Tensor, "G"] | None = None,
    ) -> dict[str, float]:
        """Return the metrics of the features of the test images.

        Args:
            queries: The features of the test images.
            labels: The class of each test image.
            gallery: The features of the gallery. ``None`` to rank the test images against each other.
            gallery_labels: The class of each gallery image; passed with ``gallery``.
        """
        raise NotImplementedError

    def raw_pixels(self) -> dict[str, float]:
        """Return the metrics of raw pixels."""
        return self._measure([pixel_features(split, self.workers) for split in self._splits()])

    def encoder(self, encoder: Encoder) -> dict[str, float]:
        """Return the metrics of the encoder's embeddings."""
        return self._measure(self.embeddings(encoder))

    def embeddings(self, encoder: Encoder) -> list[Float[Tensor, "_ D"]]:
        """Return the embeddings of the test images and, if there is one, of the gallery."""
        return self.projections(encoder, self.features(encoder))

    def features(self, encoder: Encoder) -> list[Float[Tensor, "_ F"]]:
        """Return the features of the backbone for the test images and, if there is one, for the gallery."""
        return [backbone_features(encoder, split, self.data, self.device, self.workers) for split in self._splits()]

    def projections(self, encoder: Encoder, features: list[Float[Tensor, "_ F"]]) -> list[Float[Tensor, "_ D"]]:
        """Return the embeddings of the results of ``features``."""
        return [extract_features(encoder.head, iter(rows.split(CHUNK))) for rows in features]

    def _splits(self) -> list[Split]:
        return [self.data.test, *([] if self.data.gallery is None else [self.data.gallery])]

    def _measure(self, features: list[Tensor]) -> dict[str, float]:
        labels = [split.labels for split in self._splits()]
        gallery = (features[1], labels[1]) if len(features) > 1 else ()
        return self.measure(features[0], labels[0], *gallery)


class RetrievalEvaluator(FeatureEvaluator):
    """Measure Recall@K, R-precision and MAP@R of the test images, in percent.

    Args:
        data: The data set. The test images are ranked against its gallery or, without a gallery, against each other.
        ks: The values of K.
        device: The device of the encoder.
        workers: The number of processes that read image files.

    Example:
        >>> from selfsup_xbn.data import load_data
        >>> list(RetrievalEvaluator(load_data("digits-disjoint"), ks=(1,)).raw_pixels())
        ['recall@1', 'r_precision', 'map@r']
    """

    main = "recall@1"

    def __init__(
        self, data: ImageData, ks: Sequence[int] = (1, 10), *, device: torch.device | str = "cpu", workers: int = 0
    ) -> None:
        super().__init__(data, device=device, workers=workers)
        self.ks = ks

    @classmethod
    def from_config(cls, config: Config, data: ImageData, device: torch.device) -> RetrievalEvaluator:
        """Return the evaluator of a run, with ``recall_ks`` of the config and 1, by which models are compared."""
        ks = sorted({1, *parse_numbers(config.recall_ks, "--recall-ks")})
        return cls(data, ks, device=device, workers=config.workers)

    @classmethod
    def title(cls, config: Config) -> str:
        """Return the title of a table: the metric and the data set."""
        return f"retrieval on {config.data}"

    def encoder(self, encoder: Encoder) -> dict[str, float]:
        """Return the metrics of the embeddings, and the Recall@1 of the backbone's features, ``recall@1_backbone``."""
        features = self.features(encoder)
        labels = [split.labels for split in self._splits()]
        gallery, gallery_labels = (features[1], labels[1]) if len(features) > 1 else (None, None)
        recall = recall_at_k(features[0], labels[0], gallery, gallery_labels, (1,))[1]
        return self._measure(self.projections(encoder, features)) | {"recall@1_backbone": recall}

    def measure(
        self,
        queries: Float[Tensor, "N D"],
        labels: Int64[Tensor, "N"],
        gallery: Float[Tensor, "G D"] | None = None,
        gallery_labels: Int64[Tensor, "G"] | None = None,
    ) -> dict[str, float]:
        """Return ``recall@K`` for each K, ``r_precision`` and ``map@r``; the arguments are those of the base class."""
        return retrieval_metrics(queries, labels, gallery, gallery_labels, self.ks)
