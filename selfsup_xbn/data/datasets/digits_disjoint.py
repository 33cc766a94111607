"""Handwritten digits of scikit-learn for retrieval: 0 to 4 are training classes, 5 to 9 are test classes.

Each test image is a query against the other test images.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.data.datasets import digits

TRAINING_CLASSES = 5


def load(name: str, path: str, **_: object) -> ImageData:
    """Load 901 training images of five classes and 896 test images of the other five classes.

    Args:
        name: The name of the data set.
        path: "", because the images are not read from a folder.

    Raises:
        UserError: If ``path`` is not empty.
    """
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
