"""scikit-learn's digits for retrieval: 0 to 4 train; 5 to 9, never seen, are searched among themselves. No download."""

from __future__ import annotations

from dataclasses import replace

import torch

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.data.datasets import digits

TRAINING_CLASSES = 5


def load(name: str, path: str, **_: object) -> ImageData:
    """901 training images of five classes, 896 test images of the other five."""
    data = digits.load(name, path)
    assert data.train.images is not None
    assert data.test.images is not None
    whole = Split(
        labels=torch.cat([data.train.labels, data.test.labels]),
        images=torch.cat([data.train.images, data.test.images]),
    )
    train, test = (
        whole.subset(part.nonzero().squeeze(1))
        for part in (whole.labels < TRAINING_CLASSES, whole.labels >= TRAINING_CLASSES)
    )
    return replace(data, name=name, train=train, test=test, disjoint=True)
