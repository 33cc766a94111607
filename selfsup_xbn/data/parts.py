"""Division of a data set by class, limits of its test images, and the lines that describe its parts."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor

from selfsup_xbn.data.base import ImageData, Split, limit
from selfsup_xbn.errors import UserError


def split_classes(data: ImageData, share: float) -> ImageData:
    """Divide a data set without test images: the first classes train, and the other ones are test classes.

    Args:
        data: The data set. The order of its labels is that of the sorted names.
        share: The fraction of the classes that train, in (0, 1). Their number is rounded up.

    Raises:
        UserError: If the data set has test images or no classes, or a part would have fewer than two classes.
    """
    if not data.labelled or len(data.test):
        reason = "test images already" if data.labelled else "no classes"
        raise UserError(
            f"--split-classes: expected a data set of classes without test images; {data.name} has {reason}"
        )
    classes = data.train.labels.unique()
    count = math.ceil(len(classes) * share)
    if not 2 <= count <= len(classes) - 2:
        raise UserError(
            f"--split-classes: expected at least 2 training and 2 test classes, got {count} and {len(classes) - count}"
        )
    trains = data.train.labels <= classes[count - 1]
    train, test = (data.train.subset(part.nonzero().flatten()) for part in (trains, ~trains))
    return replace(data, train=train, test=test, disjoint=True)


def limit_test(data: ImageData, count: int, seed: int) -> ImageData:
    """Limit the number of test images.

    If test classes are training classes, the images are a random subset. Otherwise a random subset of the classes is
    drawn until they have ``count`` images, and the gallery keeps the same classes, so that no query loses its correct
    images.

    Args:
        data: The data set.
        count: The number of test images. It is exceeded by less than one class.
        seed: The seed of the draw.
    """
    if count >= len(data.test):
        return data
    if not data.disjoint and data.gallery is None:
        return replace(data, test=limit(data.test, count, seed))
    classes, sizes = data.test.labels.unique(return_counts=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    needed = max(2, int((sizes[order].cumsum(0) < count).sum()) + 1)
    kept = classes[order[:needed]]
    gallery = None if data.gallery is None else _of_classes(data.gallery, kept)
    return replace(data, test=_of_classes(data.test, kept), gallery=gallery)


def _of_classes(split: Split, classes: Int64[Tensor, "C"]) -> Split:
    return split.subset(torch.isin(split.labels, classes).nonzero().flatten())


def unmatched(queries: Split, gallery: Split | None) -> int:
    """Return the number of queries without another image of their class, which retrieval metrics do not count.

    Args:
        queries: The queries.
        gallery: The images to retrieve from. ``None`` if each query is ranked against the other queries.

    Example:
        >>> unmatched(Split(torch.tensor([0, 0, 1]), paths=["a", "b", "c"]), None)
        1
    """
    if gallery is not None:
        return int((~torch.isin(queries.labels, gallery.labels)).sum())
    return int((queries.labels.unique(return_counts=True)[1] == 1).sum())


def check_matches(data: ImageData) -> None:
    """Check that retrieval has something to find.

    Raises:
        UserError: If no test image, or no validation image, has another image of its class.
    """
    for name, queries, gallery in (("test", data.test, data.gallery), ("validation", data.validation, None)):
        if queries is not None and 0 < len(queries) == unmatched(queries, gallery):
            raise UserError(
                f"{data.name}: expected at least one {name} image with another image of its class to retrieve, got none"
            )


def part_lines(data: ImageData, evaluator: str = "knn") -> list[str]:
    r"""Return lines with the images and classes of each part, and the classes that training and test set share.

    Args:
        data: The data set.
        evaluator: The name of the evaluator of the test images. ``"retrieval"`` does not count queries without a match.

    Example:
        >>> from selfsup_xbn.data import load_data
        >>> print(*part_lines(load_data("digits")), sep="\n")
        training images    1,437 of 10 classes
        test images        360 of 10 classes
        classes            all 10 test classes are training classes
    """
    parts = {
        "training images": data.train,
        "validation images": data.validation,
        "test images" if data.gallery is None else "query images": data.test,
        "gallery images": data.gallery,
    }
    lines = [f"{name:<19}{_counts(split, data)}" for name, split in parts.items() if split is not None]
    if not len(data.test) or not data.labelled:
        return lines
    retrieval = evaluator == "retrieval"
    lines.append(f"{'classes':<19}{_common_classes(data, retrieval)}")
    if retrieval and (count := unmatched(data.test, data.gallery)):
        where = "among the test images" if data.gallery is None else "in the gallery"
        lines.append(
            f"{'not counted':<19}{count:,} of {len(data.test):,} queries, which have no image of their class {where}"
        )
    return lines


def _counts(split: Split, data: ImageData) -> str:
    if not len(split):
        return "none: the run is not evaluated"
    classes = f"of {len(split.labels.unique()):,} classes" if data.labelled else "without classes"
    return f"{len(split):,} {classes}"


def _common_classes(data: ImageData, retrieval: bool) -> str:
    test = data.test.labels.unique()
    common = int(torch.isin(test, data.train.labels).sum())
    if not common:
        return "no test class is a training class (disjoint)"
    if common == len(test):
        return f"all {common:,} test classes are training classes"
    text = f"{common:,} of {len(test):,} test classes are training classes"
    wrong = f"k-NN counts the images of the other {len(test) - common:,} as wrong"
    return text if retrieval else f"warning: {text}: {wrong}"
