"""k-NN of an encoder on a data set, beside what the pixels themselves give.

Axis legend: N samples, F features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selfsup_xbn.data import ImageData, Split, eval_batches, raw_pixels
from selfsup_xbn.evaluation.features import extract_features
from selfsup_xbn.evaluation.knn import knn_classify
from selfsup_xbn.models import Encoder

CHUNK = 256


class KnnProbe:
    """Weighted k-NN top-1, in percent, of the test images.

    The bank is the training set. Where the test classes are not among the training classes it is the gallery, or, if
    there is none, the test set itself with the query left out.

    Args:
        data: the data set.
        k, temperature: as in ``knn_classify``.
        device: where the encoder runs.
        workers: processes that decode images from disk.
    """

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

    def raw_pixels(self) -> float:
        """Top-1 of the pixels themselves: what an encoder must beat."""
        return self._top1(*(raw_pixels(split, workers=self.workers) for split in self._splits()))

    def encoder(self, encoder: Encoder, suffix: str = "") -> dict[str, float]:
        """Top-1 of the projection (``knn_top1``) and of the backbone's features (``knn_top1_backbone``)."""
        features = [self._features(encoder, split) for split in self._splits()]
        embeddings = [extract_features(encoder.head, iter(part.split(CHUNK))) for part in features]
        return {"knn_top1" + suffix: self._top1(*embeddings), "knn_top1_backbone" + suffix: self._top1(*features)}

    def _splits(self) -> list[Split]:
        return [self.data.test] if self.self_search else [self.data.test, self.bank]

    def _features(self, encoder: Encoder, split: Split) -> Float[Tensor, "N F"]:
        batches = eval_batches(split, self.data, device=self.device, batch_size=CHUNK, workers=self.workers)
        return extract_features(encoder.features, batches)

    def _top1(self, queries: Tensor, bank: Tensor | None = None) -> float:
        labels = self.bank.labels
        found = knn_classify(
            queries,
            queries if bank is None else bank,
            labels.to(queries.device),
            self.data.num_classes,
            k=self.k,
            temperature=self.temperature,
            exclude_self=bank is None,
        )
        return 100 * (found.cpu() == self.data.test.labels).double().mean().item()
