"""A picture of retrieval: queries and their nearest images, right and wrong.

Axis legend: N queries, G gallery rows, C channels, D dimensions, K images a row.
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

BLOCK = 1024


def draw_gallery(
    folder: Path, evaluator: RetrievalEvaluator, encoder: Encoder, rows: int = 10, nearest: int = 5
) -> Path:
    """Draws ``retrieval.png``: a row for each of ten queries, with its nearest images framed green or red.

    Half of the rows are the hardest mistakes, where a wrong image leads the best right one by most; the others are
    spread evenly over the remaining queries, from hard to easy, so that the picture neither flatters nor frightens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = evaluator.data
    shown = nearest_images(evaluator.embeddings(encoder), data, rows, nearest)
    columns = 1 + len(shown[0].nearest)
    figure = Figure(figsize=(1.2 * columns, 1.25 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("query, then its nearest images: green right, red wrong", fontsize="medium")
    searched = data.gallery or data.test
    for axes, row in zip(figure.subplots(len(shown), columns, squeeze=False), shown, strict=True):
        _thumbnail(axes[0], image_pixels(data.test, row.query, data), "black")
        for cell, index, right in zip(axes[1:], row.nearest, row.right, strict=True):
            _thumbnail(cell, image_pixels(searched, index, data), "tab:green" if right else "tab:red")
    path = folder / "retrieval.png"
    figure.savefig(path, dpi=100)
    return path


class GalleryRow(NamedTuple):
    """A query among the test images, its nearest images in the gallery, or among the test images, and which match."""

    query: int
    nearest: list[int]
    right: list[bool]


def nearest_images(
    embeddings: Sequence[Float[Tensor, "_ D"]], data: ImageData, rows: int = 10, nearest: int = 5
) -> list[GalleryRow]:
    """The rows of a gallery picture, from embeddings of the test images and, where there is one, of the gallery."""
    queries, gallery = F.normalize(embeddings[0], dim=1), F.normalize(embeddings[-1], dim=1)
    lead, columns = _search(queries, gallery, data, min(nearest, len(gallery) - 1))
    right = (data.gallery or data.test).labels[columns] == data.test.labels[:, None]
    return [GalleryRow(q, columns[q].tolist(), right[q].tolist()) for q in choose_queries(lead, rows)]


def choose_queries(lead: Float[Tensor, "N"], rows: int) -> list[int]:
    """Queries to show, by how far their nearest wrong image leads: the worst half, and a spread over the rest."""
    order = [int(query) for query in lead.argsort(descending=True) if lead[query] < torch.inf] or [0]  # inf: no match
    worst, rest = order[: rows // 2], order[rows // 2 :]
    places = torch.linspace(0, len(rest) - 1, min(rows - len(worst), len(rest))).round().int().tolist()
    return worst + [rest[place] for place in places]


def _search(
    queries: Float[Tensor, "N D"], gallery: Float[Tensor, "G D"], data: ImageData, nearest: int
) -> tuple[Float[Tensor, "N"], Int64[Tensor, "N K"]]:
    """Each query's similarity to its nearest wrong image less that to its nearest right one, and its nearest images."""
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
    """An image of the split as an evaluation sees it."""
    return EvalFile(split, data.image_size)(index) if split.images is None else split.images[index]


def _thumbnail(axes: Any, pixels: UInt8[Tensor, "C _ _"], color: str) -> None:
    axes.imshow(pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy(), cmap="gray")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=color, linewidth=3)
