"""Cosine similarities of queries to a gallery, a block of queries at a time, and the largest of them.

Axis legend: N queries, G gallery rows, D dimensions, B queries of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from selfsup_xbn.errors import UserError

BLOCK = 2**25  # similarities that exist at one time: 128 MiB
MAX_ROWS = 1024  # more rows make the product no faster
ALIGNED = 16  # floats of a cache line: BLAS writes faster into rows that begin with one
CHUNK = 1024  # gallery rows in one product on a CPU: its output stays in the cache


class Largest(NamedTuple):
    """The k largest entries of each row, in any order, and their columns."""

    values: Float[Tensor, "B k"]
    columns: Int64[Tensor, "B k"]


def normalize_features(features: Float[Tensor, "N D"], name: str) -> Float32[Tensor, "N D"]:
    """``features`` as float32 rows of length 1; rows of zeros stay zeros.

    Raises:
        UserError: there are no rows, or one is not finite (or its length overflows float32).
    """
    if not len(features):
        raise UserError(f"{name}: expected at least one row, got none")
    features = features.float()
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    if not norms.isfinite().all():
        row = int((~norms.isfinite()).int().argmax())
        raise UserError(
            f"{name}: expected rows with a finite norm, got norm {norms[row].item()} in row {row}; "
            "remove the row, or check whether the encoder has diverged"
        )
    return features / torch.where(norms > 0, norms, 1)


def similarity_blocks(
    queries: Float32[Tensor, "N D"], gallery: Float32[Tensor, "G D"]
) -> Iterator[tuple[slice, Float32[Tensor, "B G"]]]:
    """Yield (which queries, their inner products with the gallery), at most ``BLOCK`` products at a time.

    The consumer may write into a block; the next one overwrites it. Blocks are of equal size to a row: a product
    with a single row would take another path in BLAS, where equal gallery rows can differ in the last bit. On a GPU the
    products are as precise as `torch.set_float32_matmul_precision` lets them be.
    """
    rows = min(max(BLOCK // len(gallery), 2), MAX_ROWS)
    blocks = queries.tensor_split(-(-len(queries) // rows))
    buffer = queries.new_empty(len(blocks[0]), -(-len(gallery) // ALIGNED) * ALIGNED)[:, : len(gallery)]
    start = 0
    for block in blocks:
        stop = start + len(block)
        yield slice(start, stop), _products(block, gallery, out=buffer[: len(block)])
        start = stop


def _products(
    queries: Float32[Tensor, "B D"], gallery: Float32[Tensor, "G D"], out: Float32[Tensor, "B G"]
) -> Float32[Tensor, "B G"]:
    """Write the inner products into ``out``, on a CPU ``CHUNK`` columns at a time.

    All chunks are of one size, the last one overlaps the one before: so equal gallery rows meet the same path in BLAS.
    """
    width = min(CHUNK, len(gallery)) if out.device.type == "cpu" else len(gallery)
    for chunk in range(0, len(gallery), width):
        start = min(chunk, len(gallery) - width)
        torch.mm(queries, gallery[start : start + width].T, out=out[:, start : start + width])
    return out


def top_k(values: Float[Tensor, "B G"], k: int, groups: int = 8) -> Largest:
    """The same as ``values.topk(k, sorted=False)``; on a CPU in 2/3 of the time at k 200 of 50,000, in half at k 12.

    The columns are dealt into sets of ``groups`` (at least 2). The k largest entries lie in the k sets with the
    largest maxima, so only those are searched. Which of equal entries is taken at the k-th place is not specified.
    """
    rows, width = len(values), values.shape[1] // groups
    if width <= k:
        return Largest(*values.topk(k, dim=1, sorted=False))
    dealt = values[:, : groups * width].unflatten(1, (groups, width))
    best = top_k(dealt.amax(1), k, groups).columns
    offsets = torch.arange(0, groups * width, width, device=values.device)
    remainder = torch.arange(groups * width, values.shape[1], device=values.device)
    columns = torch.cat([(offsets[:, None] + best[:, None]).flatten(1), remainder.expand(rows, -1)], dim=1)
    top = values.gather(1, columns).topk(k, dim=1, sorted=False)
    return Largest(top.values, columns.gather(1, top.indices))
