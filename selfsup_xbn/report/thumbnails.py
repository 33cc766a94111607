"""What a run's encoder makes of test images, as thumbnails for a page: a gallery of nearest images, and a map."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from selfsup_xbn.data import ImageData, Split
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.evaluators import RetrievalEvaluator
from selfsup_xbn.report.gallery import image_pixels, nearest_images
from selfsup_xbn.report.map import first_of_each, plane_of, spread_classes
from selfsup_xbn.runs.load import TrainedRun
from selfsup_xbn.utils.device import device_of

SEARCHED, A_CLASS = 2000, 20
"""Images that a gallery is searched in, about; images of a class that are taken at least, if there are so many."""
MAP_CLASSES, MAP_IMAGES = 12, 25
SIDE = 48  # pixels of a thumbnail


class Thumbnail(NamedTuple):
    """An image as a data URI, the name of its class, and whether that is the query's."""

    source: str
    label: str
    right: bool


class Dot(NamedTuple):
    """An image on the map: its place, in units of the map's longer side, and which of the map's classes it is of."""

    x: float
    y: float
    source: str
    group: int


class Pictures(NamedTuple):
    """Rows of a gallery, the query first in each; images searched, and images in all; the map, and its classes."""

    gallery: list[list[Thumbnail]]
    searched: int
    images: int
    dots: list[Dot]
    classes: list[str]


def draw_pictures(run: TrainedRun, data: ImageData) -> Pictures:
    """Pictures of a run's encoder on the test images of its data set. The choice of images depends on the data alone.

    Raises:
        UserError: the data are not those that the network was made for, or an embedding is not finite.
    """
    if data.channels != run.channels:
        raise UserError(f"{data.name} has {data.channels} channels, and the run's network takes {run.channels}")
    few, device = _some(data), device_of("auto")
    evaluator = RetrievalEvaluator(few, device=device, workers=run.config.workers)
    embeddings = [part.cpu() for part in evaluator.embeddings(run.trained.to(device))]
    dots, classes = _map(embeddings[0], few)
    searched = few.gallery or few.test
    return Pictures(_gallery(embeddings, few), len(searched), len(data.gallery or data.test), dots, classes)


def _some(data: ImageData) -> ImageData:
    """About ``SEARCHED`` images: as many classes as that allows, of each the same number in test set and gallery."""
    classes = spread_classes(data.test.labels, SEARCHED // A_CLASS)
    count = max(A_CLASS, SEARCHED // len(classes))
    test, gallery = (
        split and split.subset(first_of_each(split.labels, classes, count)) for split in (data.test, data.gallery)
    )
    assert test is not None
    return replace(data, test=test, gallery=gallery)


def _gallery(embeddings: list[Float[Tensor, "_ D"]], data: ImageData) -> list[list[Thumbnail]]:
    searched = data.gallery or data.test
    return [
        [_thumbnail(data.test, row.query, data, right=True)]
        + [_thumbnail(searched, index, data, right) for index, right in zip(row.nearest, row.right, strict=True)]
        for row in nearest_images(embeddings, data)
    ]


def _map(embeddings: Float[Tensor, "N D"], data: ImageData) -> tuple[list[Dot], list[str]]:
    classes = spread_classes(data.test.labels, MAP_CLASSES)
    chosen = first_of_each(data.test.labels, classes, MAP_IMAGES)
    groups = {name: group for group, name in enumerate(classes.tolist())}
    places = zip(chosen.tolist(), plane_of(embeddings[chosen]).tolist(), strict=True)
    dots = [
        Dot(round(x, 4), round(y, 4), _source(image_pixels(data.test, i, data)), groups[int(data.test.labels[i])])
        for i, (x, y) in places
    ]
    return dots, [_name(data, label) for label in groups]


def _thumbnail(split: Split, index: int, data: ImageData, right: bool) -> Thumbnail:
    return Thumbnail(_source(image_pixels(split, index, data)), _name(data, int(split.labels[index])), right)


def _name(data: ImageData, label: int) -> str:
    return str(data.classes[label]) if label < len(data.classes) else str(label)


def _source(pixels: UInt8[Tensor, "C H W"]) -> str:
    """A data URI: PNG of what is small or grey, JPEG of photographs, which PNG would make four times as large."""
    image = to_pil_image(pixels)
    image.thumbnail((SIDE, SIDE))
    kind = "jpeg" if len(pixels) == 3 and image.width > 32 else "png"
    content = io.BytesIO()
    image.save(content, kind)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
