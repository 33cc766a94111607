"""What a data set is to the rest of the package: splits of images with labels, and how to look at them.

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
    """One part of a data set: either all images in memory, or the paths of their files.

    Attributes:
        labels: class index of each sample.
        images: pixels in memory; ``None`` when the images stay on disk.
        paths: file of each sample; ``None`` when the images are in memory.
        boxes: crop of each file in pixels, (x1, y1, x2, y2), right and lower edge exclusive; ``None`` for whole images.
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
        """The samples at ``index``, in that order."""
        return replace(
            self,
            labels=self.labels[index],
            images=None if self.images is None else self.images[index],
            paths=None if self.paths is None else [self.paths[i] for i in index.tolist()],
            boxes=None if self.boxes is None else self.boxes[index],
        )


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set as every mode sees it.

    Attributes:
        name: the specification that made it, e.g. ``"cifar10"`` or ``"folder:/photos"``.
        train: images to learn from.
        test: images to evaluate on; the queries where there is a ``gallery``.
        validation: images of classes that were held out of ``train``, to choose a model on; searched in themselves.
        gallery: images that the queries are searched in; ``None``: the test set is searched in itself, self left out.
        classes: name of each label.
        disjoint: the test classes are not among the training classes (retrieval benchmarks).
        image_size: side S in pixels of the square that a network sees.
        mean, std: per-channel normalisation of pixels in [0, 1].
        augmentation: which family of random views suits the images: ``"digits"``, ``"cifar"``, ``"photo"``...
        notes: lines to show the user: counts found beside the official ones, warnings.
    """

    name: str
    train: Split
    test: Split
    gallery: Split | None = None
    validation: Split | None = None
    classes: Sequence[str] = ()
    disjoint: bool = False
    image_size: int = 32
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    augmentation: str = "photo"
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """One more than the largest label of any split."""
        splits = [self.train, self.test] + ([self.gallery] if self.gallery is not None else [])
        return 1 + max(int(split.labels.max()) for split in splits)

    @property
    def channels(self) -> int:
        """Channels C of a batch: those in memory, or 3 for files (always read as RGB)."""
        return 3 if self.train.images is None else self.train.images.shape[1]


def limit(split: Split, count: int, seed: int) -> Split:
    """``count`` samples drawn without replacement, the same for the same seed; all of them where there are fewer."""
    if count >= len(split):
        return split
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.subset(order[:count].sort().values)


def hold_out_classes(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Return the samples of most classes and those of ``share`` of the classes, drawn with the seed.

    Args:
        split: samples of C classes.
        share: of the classes to hold out, above 0 and below 1; their number is rounded up.
        seed: of the draw.

    Raises:
        UserError: fewer than two classes are held out, or fewer than two are left.
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
