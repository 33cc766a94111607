"""Plot of retrieval results: queries with their nearest images.

Axis legend: N queries, G gallery rows, C channels, D embedding dimension, K images per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from selfsup_xbn.data import ImageData, Split
from selfsup_xbn.data.files import EvalFile
from selfsup_xbn.evaluation.evaluators import RetrievalEvaluator
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.utils.atomic import replacing

BLOCK = 1024
CAPTION = (
    "left column (blue): queries, hardest first; right: nearest images, nearest first\n"
    "(green: same class, red: other class)"
)
TITLE = 20
"""Maximum number of characters of a class name above an image."""


def draw_gallery(
    folder: Path, evaluator: RetrievalEvaluator, encoder: Encoder, rows: int = 10, nearest: int = 5
) -> Path:
    """Plot queries with their nearest images to ``retrieval.png`` in the run folder, and return its path.

    The query has a blue border. Images of its class have a green one, other images a red one. Half of the rows are the
    queries whose nearest wrong image exceeds the nearest correct one the most in similarity. The other rows are spread
    evenly over the remaining queries, so that the plot shows typical results as well as failures.

    Args:
        folder: Run folder.
        evaluator: Evaluator with the data set.
        encoder: Encoder to evaluate.
        rows: Number of queries.
        nearest: Number of images K per query.

    Raises:
        UserError: The file could not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = evaluator.data
    shown = nearest_images(evaluator.embeddings(encoder), data, rows, nearest)
    columns = 1 + len(shown[0].nearest)
    figure = Figure(figsize=(1.5 * columns, 1.75 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(CAPTION, fontsize="medium")
    searched = data.gallery or data.test
    for axes, row in zip(figure.subplots(len(shown), columns, squeeze=False), shown, strict=True):
        _thumbnail(axes[0], data.test, row.query, data, "tab:blue")
        for cell, index, right in zip(axes[1:], row.nearest, row.right, strict=True):
            _thumbnail(cell, searched, index, data, "tab:green" if right else "tab:red")
    path = folder / "retrieval.png"
    with replacing(path) as file:
        figure.savefig(file, dpi=100)
    return path


class GalleryRow(NamedTuple):
    """A query and its nearest images in the gallery, or in the test set if there is no gallery.

    Attributes:
        query: Index of the query in the test set.
        nearest: Indices of the nearest images, nearest first.
        right: Whether each of them has the class of the query.
    """

    query: int
    nearest: list[int]
    right: list[bool]


def nearest_images(
    embeddings: Sequence[Float[Tensor, "_ D"]],
    data: ImageData,
    rows: int = 10,
    nearest: int = 5,
    chosen: Sequence[int] | None = None,
) -> list[GalleryRow]:
    """Select queries as in ``draw_gallery``, and find their nearest images.

    Args:
        embeddings: Embeddings of the test images, [N, D], followed by those of the gallery, [G, D], if there is one.
        data: Data set.
        rows: Number of queries.
        nearest: Number of images K per query.
        chosen: Indices of the queries, in place of the selection.
    """
    queries, gallery = F.normalize(embeddings[0], dim=1), F.normalize(embeddings[-1], dim=1)
    lead, columns = _search(queries, gallery, data, min(nearest, len(gallery) - 1))
    right = (data.gallery or data.test).labels[columns] == data.test.labels[:, None]
    return [GalleryRow(q, columns[q].tolist(), right[q].tolist()) for q in chosen or choose_queries(lead, rows)]


def choose_queries(lead: Float[Tensor, "N"], rows: int) -> list[int]:
    """Select queries: the half with the largest leads, and others that are spread evenly over the rest.

    Args:
        lead: Similarity of each query to its nearest wrong image minus that to its nearest correct image, [N].
        rows: Number of queries to select.

    Returns:
        Indices of the queries, by descending lead.
    """
    descending = lead.argsort(descending=True)
    matched = descending[lead[descending] < torch.inf].tolist()
    order = matched or [0]  # the lead is infinite if there is no correct image
    worst, rest = order[: rows // 2], order[rows // 2 :]
    positions = torch.linspace(0, len(rest) - 1, min(rows - len(worst), len(rest))).round().int().tolist()
    return worst + [rest[position] for position in positions]


def _search(
    queries: Float[Tensor, "N D"], gallery: Float[Tensor, "G D"], data: ImageData, nearest: int
) -> tuple[Float[Tensor, "N"], Int64[Tensor, "N K"]]:
    """Return the lead of each query as in ``choose_queries``, [N], and the indices of its nearest images, [N, K]."""
    labels, searched = data.test.labels, (data.gallery or data.test).labels
    lead, columns = [], []
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK]
        similarity = (block @ gallery.T).cpu()
        if data.gallery is None:
            similarity[torch.arange(len(block)), torch.arange(start, start + len(block))] = -torch.inf
        right = labels[start : start + BLOCK, None] == searched
        best = [similarity.masked_fill(mask, -torch.inf).amax(1) for mask in (right, ~right)]
        lead.append(best[0] - best[1])
        columns.append(similarity.topk(nearest).indices)
    return torch.cat(lead), torch.cat(columns)


def image_pixels(split: Split, index: int, data: ImageData) -> UInt8[Tensor, "C _ _"]:
    """Return an image of a split as the evaluation uses it, [C, H, W] in uint8.

    Args:
        split: Split of the data set.
        index: Index of the image.
        data: Data set of the split.
    """
    return EvalFile(split, data.image_size)(index) if split.images is None else split.images[index]


def class_name(data: ImageData, label: int) -> str:
    """Return the name of a class, or its number if the data set has no name for it."""
    return str(data.classes[label]) if label < len(data.classes) else str(label)


def _thumbnail(axes: Any, split: Split, index: int, data: ImageData, color: str) -> None:
    pixels = image_pixels(split, index, data)
    name = class_name(data, int(split.labels[index])).rpartition("/")[2]
    axes.set_title(name if len(name) <= TITLE else name[: TITLE - 1] + "…", fontsize="x-small", parse_math=False)
    axes.imshow(pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy(), cmap="gray")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=color, linewidth=3)
