"""Handwritten digits: the 1,797 gray images of 8 x 8 pixels of scikit-learn, which need no download."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.errors import UserError

TEST_IMAGES = 360
SPLIT_SEED = 0


def load(name: str, path: str, **_: object) -> ImageData:
    """Load 1,437 training and 360 test images, stratified by class. The split is fixed.

    Args:
        name: The name of the data set.
        path: "", because the images are not read from a folder.

    Raises:
        UserError: If ``path`` is not empty.
    """
    if path:
        raise UserError(f"{name}:{path}: expected no path, because scikit-learn provides the images; write {name}")
    return _data()


@cache
def _data() -> ImageData:
    digits = load_digits()
    # Gray levels from 0 to 16 are scaled to 8 bits, in one channel.
    images = torch.from_numpy((digits.images * 255 / 16).round()).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=TEST_IMAGES, stratify=digits.target, random_state=SPLIT_SEED
    )
    whole = Split(labels, images)
    return ImageData(
        name="digits",
        train=whole.subset(torch.from_numpy(train)),
        test=whole.subset(torch.from_numpy(test)),
        classes=[str(name) for name in digits.target_names],
        image_size=8,
        mean=(0.3053,),
        std=(0.3763,),
        augmentation="digits",
    )
