"""Thumbnails for the page: nearest test images according to the encoder of a run, and a map of the embeddings."""

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
from selfsup_xbn.report.gallery import GalleryRow, class_name, image_pixels, nearest_images
from selfsup_xbn.report.map import first_of_each, plane_of, spread_classes
from selfsup_xbn.runs.load import TrainedRun
from selfsup_xbn.utils.device import device_of

SEARCHED, SEARCHED_PER_CLASS = 2000, 20
"""Approximate number of images to search, and minimum number of images per class, if the class has as many."""
MAP_CLASSES, MAP_PER_CLASS = 12, 25
"""Number of classes on the map, and number of images per class."""
SIDE, MAP_SIDE = 112, 48
"""Height and width in pixels of a thumbnail in the gallery and on the map."""


class Thumbnail(NamedTuple):
    """An image of the gallery.

    Attributes:
        source: Image as a data URI.
        label: Name of its class.
        right: Whether its class is that of the query.
    """

    source: str
    label: str
    right: bool


class Dot(NamedTuple):
    """An image on the map.

    Attributes:
        x: Horizontal position in units of the longer side of the map.
        y: Vertical position in the same units.
        source: Image as a data URI.
        group: Index of its class among the classes of the map.
    """

    x: float
    y: float
    source: str
    group: int


class Pictures(NamedTuple):
    """Gallery and map of a run.

    Attributes:
        gallery: Rows of images, each with the query first.
        queries: Indices of the queries in the searched subset.
        searched: Number of images that were searched.
        images: Number of images in the data set to search.
        dots: Images on the map.
        classes: Names of the classes on the map.
    """

    gallery: list[list[Thumbnail]]
    queries: list[int]
    searched: int
    images: int
    dots: list[Dot]
    classes: list[str]


def draw_pictures(run: TrainedRun, data: ImageData, chosen: list[int] | None = None) -> Pictures:
    """Return the gallery and the map of a run on a subset of its test images.

    The subset depends on the data set only, so that runs on the same data set are comparable.

    Args:
        run: Run with its encoder.
        data: Data set of the run.
        chosen: Queries to show, as in ``Pictures.queries``. By default they are selected as in ``nearest_images``.

    Raises:
        UserError: There are no test images, the number of channels does not fit the network, or an embedding is not
            finite.
    """
    if data.channels != run.channels:
        raise UserError(f"{data.name}: expected images of {run.channels} channels, got {data.channels}")
    if not len(data.test):
        raise UserError(f"{data.name} has no test images")
    subset, device = _subset(data), device_of("auto")
    evaluator = RetrievalEvaluator(subset, device=device, workers=run.config.workers)
    embeddings = [rows.cpu() for rows in evaluator.embeddings(run.trained.to(device))]
    dots, classes = _map(embeddings[0], subset)
    searched = subset.gallery or subset.test
    rows = nearest_images(embeddings, subset, chosen=chosen)
    queries = [row.query for row in rows]
    return Pictures(_gallery(rows, subset), queries, len(searched), len(data.gallery or data.test), dots, classes)


def _subset(data: ImageData) -> ImageData:
    """Return the data set with about ``SEARCHED`` test images, and as many gallery images.

    The classes are spread evenly over the labels. Each keeps at most the same number of images in both splits.
    """
    classes = spread_classes(data.test.labels, SEARCHED // SEARCHED_PER_CLASS)
    count = max(SEARCHED_PER_CLASS, SEARCHED // len(classes))
    test, gallery = (
        split and split.subset(first_of_each(split.labels, classes, count)) for split in (data.test, data.gallery)
    )
    assert test is not None
    return replace(data, test=test, gallery=gallery)


def _gallery(rows: list[GalleryRow], data: ImageData) -> list[list[Thumbnail]]:
    searched = data.gallery or data.test
    return [
        [_thumbnail(data.test, row.query, data, right=True)]
        + [_thumbnail(searched, index, data, right) for index, right in zip(row.nearest, row.right, strict=True)]
        for row in rows
    ]


def _map(embeddings: Float[Tensor, "N D"], data: ImageData) -> tuple[list[Dot], list[str]]:
    classes = spread_classes(data.test.labels, MAP_CLASSES)
    selected = first_of_each(data.test.labels, classes, MAP_PER_CLASS)
    groups = {name: group for group, name in enumerate(classes.tolist())}
    labels = data.test.labels[selected].tolist()
    positions = zip(selected.tolist(), labels, plane_of(embeddings[selected]).tolist(), strict=True)
    dots = [
        Dot(round(x, 4), round(y, 4), _source(image_pixels(data.test, index, data), MAP_SIDE), groups[label])
        for index, label, (x, y) in positions
    ]
    return dots, [class_name(data, label) for label in groups]


def _thumbnail(split: Split, index: int, data: ImageData, right: bool) -> Thumbnail:
    name = class_name(data, int(split.labels[index]))
    return Thumbnail(_source(image_pixels(split, index, data), SIDE), name, right)


def _source(pixels: UInt8[Tensor, "C H W"], side: int) -> str:
    """Return a thumbnail as a data URI: JPEG for photographs, PNG for small or gray images."""
    image = to_pil_image(pixels)
    image.thumbnail((side, side))
    kind = "jpeg" if len(pixels) == 3 and image.width > 32 else "png"
    content = io.BytesIO()
    image.save(content, kind)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
