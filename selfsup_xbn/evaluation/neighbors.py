"""Blockwise cosine similarities of queries and a gallery, and their k largest values.

Axis legend: N queries, G gallery rows, D dimensions, B queries of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from selfsup_xbn.errors import UserError

BLOCK = 2**25  # maximum number of similarities of a block: 128 MiB
MAX_ROWS = 1024  # maximum number of queries of a block; the product is not faster with more
ALIGNED = 16  # floats per cache line; BLAS is faster if each row of its output begins a line
CHUNK = 1024  # gallery rows per product on a CPU, whose output then remains in the cache


class Largest(NamedTuple):
    """The k largest entries of each row, in any order.

    Attributes:
        values: The entries.
        columns: The columns of the entries.
    """

    values: Float[Tensor, "B k"]
    columns: Int64[Tensor, "B k"]


def normalize_features(features: Float[Tensor, "N D"], name: str) -> Float32[Tensor, "N D"]:
    """Normalize the rows to length 1, in float32. Rows of zeros remain zeros.

    Args:
        features: The rows.
        name: The name of the features for error messages.

    Raises:
        UserError: If there are no rows, or the length of a row is not finite in float32.

    Example:
        >>> normalize_features(torch.tensor([[3.0, 4.0]]), "features")
        tensor([[0.6000, 0.8000]])
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
    """Yield the inner products of the queries and the gallery, at most ``BLOCK`` of them at a time.

    The caller may modify a block. The next block overwrites it. The numbers of rows of two blocks differ by at most
    one, so that no block has a single row: for such a product BLAS uses another algorithm, whose results for equal
    gallery rows can differ in the last bit. On a GPU the precision is that of ``torch.set_float32_matmul_precision``.

    Args:
        queries: The rows of the similarities.
        gallery: The columns of the similarities.

    Yields:
        The slice of the queries, and their inner products with all gallery rows.

    Example:
        >>> for rows, similarities in similarity_blocks(torch.eye(3), torch.eye(3)):
        ...     print(rows, similarities.shape)
        slice(0, 3, None) torch.Size([3, 3])
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
    """Write the inner products into ``out``, on a CPU in chunks of ``CHUNK`` columns.

    All chunks have the same size, and the last one overlaps the one before it. BLAS then uses the same algorithm for
    all gallery rows, so that equal rows give equal results.
    """
    width = min(CHUNK, len(gallery)) if out.device.type == "cpu" else len(gallery)
    for chunk in range(0, len(gallery), width):
        start = min(chunk, len(gallery) - width)
        torch.mm(queries, gallery[start : start + width].T, out=out[:, start : start + width])
    return out


def top_k(values: Float[Tensor, "B G"], k: int, groups: int = 8) -> Largest:
    """Return the k largest entries of each row, as ``values.topk(k, sorted=False)`` does.

    The columns are divided into sets of ``groups`` columns. The k largest entries are in the k sets with the largest
    maxima, so only these sets are searched. On a CPU and with 50,000 columns this takes 2/3 of the time of
    ``Tensor.topk`` for k = 200 and half of it for k = 12. If several entries equal the k-th largest one, it is not
    specified which of them are returned.

    Args:
        values: The rows to search.
        k: The number of entries, at most G.
        groups: The number of columns of a set, at least 2.

    Example:
        >>> top_k(torch.tensor([[3.0, 1.0, 2.0]]), k=1)
        Largest(values=tensor([[3.]]), columns=tensor([[0]]))
    """
    rows, width = len(values), values.shape[1] // groups
    if width <= k:
        return Largest(*values.topk(k, dim=1, sorted=False))
    sets = values[:, : groups * width].unflatten(1, (groups, width))
    best = top_k(sets.amax(1), k, groups).columns
    offsets = torch.arange(0, groups * width, width, device=values.device)
    remainder = torch.arange(groups * width, values.shape[1], device=values.device)
    columns = torch.cat([(offsets[:, None] + best[:, None]).flatten(1), remainder.expand(rows, -1)], dim=1)
    top = values.gather(1, columns).topk(k, dim=1, sorted=False)
    return Largest(top.values, columns.gather(1, top.indices))
