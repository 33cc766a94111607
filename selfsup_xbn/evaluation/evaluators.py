"""What an encoder is worth on a data set: k-NN or retrieval, beside what the pixels themselves give.

Axis legend: N samples, F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.config.parsing import parse_numbers
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data import ImageData, Split, eval_batches, raw_pixels
from selfsup_xbn.evaluation.features import evaluating, extract_features
from selfsup_xbn.evaluation.knn import knn_classify
from selfsup_xbn.evaluation.retrieval import retrieval_metrics
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.utils.distributed import gather, shard_slice, world

CHUNK, CUDA_CHUNK = 256, 2000  # images of a batch


@runtime_checkable
class Evaluator(Protocol):
    """What is measured of an encoder on a data set: built once, then called after each epoch. Values are in percent.

    Attributes:
        main: the name of the value by which two encoders are compared.
    """

    main: str

    @classmethod
    def from_config(cls, config: Config, data: ImageData, device: torch.device) -> Evaluator:
        """Return the evaluator of a run."""
        ...

    @classmethod
    def title(cls, config: Config) -> str:
        """Return what is measured, on which data, for the head of a table."""
        ...

    def encoder(self, encoder: Encoder) -> dict[str, float]:
        """Return the values of an encoder."""
        ...

    def raw_pixels(self) -> dict[str, float]:
        """Return the same values of the pixels themselves."""
        ...


def baselines(evaluator: Evaluator, untrained: Encoder) -> dict[str, float]:
    """Return the values of raw pixels and of an untrained encoder, as ``NAME_raw_pixels`` and ``NAME_untrained``."""
    pixels = {f"{name}_raw_pixels": value for name, value in evaluator.raw_pixels().items()}
    return pixels | {f"{name}_untrained": value for name, value in evaluator.encoder(untrained).items()}


class KnnEvaluator:
    """Weighted k-NN top-1, in percent, of the test images.

    The bank is the training set. Where the test classes are not among the training classes it is the gallery, or, if
    there is none, the test set itself with the query left out.

    Args:
        data: the data set.
        k, temperature: as in ``knn_classify``.
        device: where the encoder runs.
        workers: processes that decode images from disk.
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
            warnings.warn(f"k-NN: k={k} exceeds the {self.k} neighbours in the bank; using k={self.k}", stacklevel=2)

    @classmethod
    def from_config(cls, config: Config, data: ImageData, device: torch.device) -> KnnEvaluator:
        """Return the evaluator with the config's k and temperature."""
        return cls(data, k=config.knn_k, temperature=config.knn_temperature, device=device, workers=config.workers)

    @classmethod
    def title(cls, config: Config) -> str:
        """Return what is measured, on which data."""
        return f"k-NN on {config.data}, k {config.knn_k}, T {config.knn_temperature:g}"

    def raw_pixels(self) -> dict[str, float]:
        """Return top-1 of the pixels themselves."""
        pixels = [pixel_features(split, self.workers).to(self.device) for split in self._splits()]
        return {"knn_top1": self._top1(*pixels)}

    def encoder(self, encoder: Encoder) -> dict[str, float]:
        """Return top-1 of the projection (``knn_top1``) and of the backbone's features (``knn_top1_backbone``)."""
        features = [backbone_features(encoder, split, self.data, self.device, self.workers) for split in self._splits()]
        projections = [extract_features(encoder.head, iter(part.split(CHUNK))) for part in features]
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
    """Base class of evaluators that measure the embeddings of the test images, in the gallery or among themselves.

    A subclass names its ``main`` metric and defines ``measure``. Its metrics are shown in tables and curves once they
    are in ``METRICS``.

    Args:
        data: the data set.
        device: where the encoder runs.
        workers: processes that decode images from disk.
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
        """Return what is measured, on which data."""
        return f"{cls.main} on {config.data}"

    def measure(
        self,
        queries: Float[Tensor, "N D"],
        labels: Int64[Tensor, "N"],
        gallery: Float[Tensor, "G D"] | None = None,
        gallery_labels: Int64[Tensor, "G"] | None = None,
    ) -> dict[str, float]:
        """Return the metrics of features of the test images; without a gallery they are searched among themselves."""
        raise NotImplementedError

    def raw_pixels(self) -> dict[str, float]:
        """Return the metrics of the pixels themselves."""
        return self._measure([pixel_features(split, self.workers) for split in self._splits()])

    def encoder(self, encoder: Encoder) -> dict[str, float]:
        """Return the metrics of the encoder's embeddings."""
        return self._measure(self.embeddings(encoder))

    def embeddings(self, encoder: Encoder) -> list[Float[Tensor, "_ D"]]:
        """Return embeddings of the queries and, where there is one, of the gallery."""
        features = [backbone_features(encoder, split, self.data, self.device, self.workers) for split in self._splits()]
        return [extract_features(encoder.head, iter(part.split(CHUNK))) for part in features]

    def _splits(self) -> list[Split]:
        return [self.data.test, *([] if self.data.gallery is None else [self.data.gallery])]

    def _measure(self, features: list[Tensor]) -> dict[str, float]:
        labels = [split.labels for split in self._splits()]
        gallery = (features[1], labels[1]) if len(features) > 1 else ()
        return self.measure(features[0], labels[0], *gallery)


class RetrievalEvaluator(FeatureEvaluator):
    """Recall@K, R-precision and MAP@R, in percent, of the test images in the gallery, or among themselves.

    Args:
        data: the data set.
        ks: K of Recall@K.
        device: where the encoder runs.
        workers: processes that decode images from disk.
    """

    main = "recall@1"

    def __init__(
        self, data: ImageData, ks: Sequence[int] = (1, 10), *, device: torch.device | str = "cpu", workers: int = 0
    ) -> None:
        super().__init__(data, device=device, workers=workers)
        self.ks = ks

    @classmethod
    def from_config(cls, config: Config, data: ImageData, device: torch.device) -> RetrievalEvaluator:
        """Return the evaluator with the config's K."""
        ks = parse_numbers(config.recall_ks, "--recall-ks")
        return cls(data, ks, device=device, workers=config.workers)

    @classmethod
    def title(cls, config: Config) -> str:
        """Return what is measured, on which data."""
        return f"retrieval on {config.data}"

    def measure(
        self,
        queries: Float[Tensor, "N D"],
        labels: Int64[Tensor, "N"],
        gallery: Float[Tensor, "G D"] | None = None,
        gallery_labels: Int64[Tensor, "G"] | None = None,
    ) -> dict[str, float]:
        """Return ``recall@K`` for each K, ``r_precision`` and ``map@r``."""
        return retrieval_metrics(queries, labels, gallery, gallery_labels, self.ks)


def backbone_features(
    encoder: Encoder, split: Split, data: ImageData, device: torch.device, workers: int
) -> Float[Tensor, "N F"]:
    """Return the backbone's features of a split, in order. On CUDA the network runs in bfloat16 and channels_last."""
    cuda = device.type == "cuda"
    batch_size = CUDA_CHUNK if cuda else CHUNK

    def features(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            return encoder.features(images.contiguous(memory_format=torch.channels_last) if cuda else images)

    with evaluating(encoder):
        return _in_parts(
            split,
            lambda own: extract_features(
                features, eval_batches(own, data, device=device, batch_size=batch_size, workers=workers)
            ),
        )


def pixel_features(split: Split, workers: int) -> Float[Tensor, "N F"]:
    """Return the pixels of a split, in order."""
    return _in_parts(split, lambda own: raw_pixels(own, workers=workers))


def _in_parts(split: Split, function: Callable[[Split], Tensor]) -> Tensor:
    """``function`` of all samples, a row each, in order: each process computes its part of them."""
    if not 1 < world() <= len(split):
        return function(split)
    own = shard_slice(len(split))
    return gather(function(split.subset(torch.arange(own.start, own.stop))), len(split))
