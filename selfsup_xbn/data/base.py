"""The common form of all data sets: splits of labeled images and their preprocessing.

Axis legend: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from selfsup_xbn.errors import UserError


@dataclass(frozen=True, eq=False)
class Split:
    """A labeled part of a data set, with either the images in memory or the paths of their files.

    Attributes:
        labels: The class index of each sample.
        images: The pixels. ``None`` if the images are read from files.
        paths: The file of each sample. ``None`` if the images are in memory.
        boxes: The box (x1, y1, x2, y2) in pixels to crop from each file, with x2 and y2 exclusive. ``None`` for whole
            images.

    Raises:
        ValueError: If not exactly one of ``images`` and ``paths`` is passed, or their number is not that of the labels.
        UserError: If the labels are not int64 or one of them is negative.
    """

    labels: Int64[Tensor, "N"]
    images: UInt8[Tensor, "N C H W"] | None = None
    paths: Sequence[str] | None = None
    boxes: Int[Tensor, "N 4"] | None = None

    def __post_init__(self) -> None:
        if (self.images is None) == (self.paths is None):
            count = "neither" if self.images is None else "both"
            raise ValueError(f"expected exactly one of images and paths, got {count}")
        pixels = self.images if self.images is not None else self.paths
        assert pixels is not None
        if len(pixels) != len(self.labels):
            raise ValueError(f"expected one label per image, got {len(self.labels)} labels for {len(pixels)} images")
        if self.labels.dtype != torch.int64 or (len(self.labels) and int(self.labels.min()) < 0):
            minimum = self.labels.min().item() if len(self.labels) else "none"
            raise UserError(
                f"expected int64 labels of at least 0, got {self.labels.dtype} labels with minimum {minimum}; "
                "number the classes from 0"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Int64[Tensor, "n"]) -> Split:
        """Return the samples at the given indices, in that order."""
        return replace(
            self,
            labels=self.labels[index],
            images=None if self.images is None else self.images[index],
            paths=None if self.paths is None else [self.paths[i] for i in index.tolist()],
            boxes=None if self.boxes is None else self.boxes[index],
        )


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set with all its splits.

    Attributes:
        name: The specification of the data set, e.g. ``"cifar10"`` or ``"folder:/photos"``.
        train: The training images.
        test: The test images. If there is a ``gallery``, they are the queries. A split of length 0 if there are none.
        validation: Images that are held out of ``train``, for model selection. Each image is a query against the
            others.
        gallery: The images to retrieve from. ``None`` if each test image is a query against the others.
        classes: The name of each label.
        labelled: Whether the labels are classes. Images without classes can only be pretrained on.
        disjoint: Whether no test class is a training class, as in retrieval benchmarks.
        image_size: The side S in pixels of the network's square input.
        mean: The mean of each channel for pixels in [0, 1], used for normalization.
        std: The standard deviation of each channel for pixels in [0, 1], used for normalization.
        augmentation: The default family of random views, e.g. ``"digits"``, ``"cifar"`` or ``"photo"``.
        notes: Lines for the user, such as counts of images and warnings.
        digest: The SHA-256 of images that other versions of a package may produce otherwise, or "". It stands in
            ``config.json``.
    """

    name: str
    train: Split
    test: Split
    gallery: Split | None = None
    validation: Split | None = None
    classes: Sequence[str] = ()
    labelled: bool = True
    disjoint: bool = False
    image_size: int = 32
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    augmentation: str = "photo"
    notes: tuple[str, ...] = ()
    digest: str = ""

    @property
    def num_classes(self) -> int:
        """The number of classes: one more than the largest label of the splits."""
        splits = [split for split in (self.train, self.validation, self.test, self.gallery) if split]
        return 1 + max(int(split.labels.max()) for split in splits)

    @property
    def channels(self) -> int:
        """The number of channels C of a batch. Files are always read as RGB, with 3 channels."""
        return 3 if self.train.images is None else self.train.images.shape[1]


def limit(split: Split, count: int, seed: int) -> Split:
    """Return a random subset of a split.

    Args:
        split: The samples to draw from.
        count: The number of samples to draw without replacement. A smaller split is returned unchanged.
        seed: The seed of the draw.

    Returns:
        The drawn samples, in their original order.
    """
    if count >= len(split):
        return split
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.subset(order[:count].sort().values)


def hold_out_classes(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Split the samples by class into a kept and a held-out part.

    Args:
        split: The samples to divide.
        share: The fraction of the classes to hold out, in (0, 1). Their number is rounded up.
        seed: The seed of the random choice of classes.

    Returns:
        The samples of the kept classes and the samples of the held-out classes.

    Raises:
        UserError: If fewer than two classes are held out or kept.
    """
    classes = split.labels.unique()
    count = math.ceil(len(classes) * share)
    if not 2 <= count <= len(classes) - 2:
        raise UserError(
            f"expected --validation to hold out at least 2 training classes and to keep at least 2, got {count} of "
            f"{len(classes)} classes held out; change the share"
        )
    drawn = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))[:count]
    held_out = torch.isin(split.labels, classes[drawn])
    return split.subset((~held_out).nonzero().flatten()), split.subset(held_out.nonzero().flatten())
