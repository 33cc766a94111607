"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), read and if necessary downloaded by torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

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
        UserError: If the files are missing or damaged, and cannot be downloaded.
    """
    dataset, folder, archive = SETS[name]
    root = path or root
    try:
        train, test = (dataset(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        place = Path(root) / folder
        damaged = _damaged(dataset, place, Path(root) / archive)
        raise UserError(
            f"{f'{damaged} is damaged (its checksum differs)' if damaged else f'{name} not found in {place}'}, "
            f"and the download failed ({error}); put {archive} from https://www.cs.toronto.edu/~kriz/cifar.html into "
            f"{root}"
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


def place_without_files(name: str, path: str, *, root: str) -> Path | None:
    """Return the folder in which the files are expected, or ``None`` if it or the archive is there.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        path: As in ``load``.
        root: As in ``load``.
    """
    _, folder, archive = SETS[name]
    place = Path(path or root) / folder
    return None if place.exists() or (place.parent / archive).exists() else place


def _damaged(dataset: type[datasets.CIFAR10], folder: Path, archive: Path) -> Path | None:
    """Return the first file that exists and does not have the official checksum, or ``None``."""
    checksums = [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]
    files = [(archive, dataset.tgz_md5), *((folder / name, md5) for name, md5 in checksums)]
    return next((file for file, md5 in files if file.exists() and not check_integrity(file, md5)), None)


def _split(part: datasets.CIFAR10) -> Split:
    return Split(torch.tensor(part.targets), torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous())
