"""A picture of retrieval: queries and their nearest images, right and wrong.

Axis legend: N queries, G gallery rows, D dimensions, Q queries shown, K images a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup_xbn.data import ImageData, Split
from selfsup_xbn.data.files import EvalFile
from selfsup_xbn.evaluation.probe import RetrievalProbe
from selfsup_xbn.models import Encoder

BLOCK = 1024


def draw_gallery(folder: Path, probe: RetrievalProbe, encoder: Encoder, rows: int = 10, nearest: int = 5) -> Path:
    """Draws ``retrieval.png``: a row for each of ten queries, with its nearest images framed green or red.

    Half of the rows are the hardest mistakes, where a wrong image leads the best right one by most; the others are
    spread evenly over the remaining queries, from hard to easy, so that the picture neither flatters nor frightens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = probe.data
    embeddings = [F.normalize(part, dim=1) for part in probe.embeddings(encoder)]
    nearest = min(nearest, len(embeddings[-1]) - 1)
    lead, columns = _search(embeddings[0], embeddings[-1], data, nearest)
    shown = choose_queries(lead, rows)
    figure = Figure(figsize=(1.2 * (nearest + 1), 1.25 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("query, then its nearest images: green right, red wrong", fontsize="medium")
    searched = data.gallery or data.test
    for axes, query in zip(figure.subplots(len(shown), nearest + 1, squeeze=False), shown, strict=True):
        _thumbnail(axes[0], data.test, query, data, "black")
        for cell, column in zip(axes[1:], columns[query].tolist(), strict=True):
            right = bool(searched.labels[column] == data.test.labels[query])
            _thumbnail(cell, searched, column, data, "tab:green" if right else "tab:red")
    path = folder / "retrieval.png"
    figure.savefig(path, dpi=100)
    return path


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


def _thumbnail(axes: Any, split: Split, index: int, data: ImageData, color: str) -> None:
    pixels = EvalFile(split, data.image_size)(index) if split.images is None else split.images[index]
    axes.imshow(pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy(), cmap="gray")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=color, linewidth=3)
