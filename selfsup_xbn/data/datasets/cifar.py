"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), read and if necessary downloaded by torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision import datasets

from selfsup_xbn.data.base import ImageData, Split
from selfsup_xbn.errors import UserError

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
"""Normalization of the MoCo notebook for CIFAR-10, also used for CIFAR-100."""

SETS = {
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python", "cifar-100-python.tar.gz"),
}


def load(name: str, path: str, *, root: str, **_: object) -> ImageData:
    """Load the 50,000 training and 10,000 test images of 32 x 32 pixels.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        path: The folder that contains the extracted archive, or "" for ``root``.
        root: The folder of all data sets.

    Raises:
        UserError: If the files are missing and cannot be downloaded.
    """
    dataset, folder, archive = SETS[name]
    root = path or root
    try:
        train, test = (dataset(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} not found in {Path(root) / folder}, and the download failed ({error}); "
            f"put {archive} from https://www.cs.toronto.edu/~kriz/cifar.html into {root}"
        ) from error
    return ImageData(
        name=name,
        train=_split(train),
        test=_split(test),
        classes=train.classes,
        mean=MEAN,
        std=STD,
        augmentation="cifar",
    )


def _split(part: datasets.CIFAR10) -> Split:
    return Split(torch.tensor(part.targets), torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous())
