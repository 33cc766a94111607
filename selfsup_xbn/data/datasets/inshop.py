"""DeepFashion's In-Shop Clothes Retrieval (Liu et al., 2016): several photos of each piece of clothing in a shop.

https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html. ``list_eval_partition.txt`` lists the images.
Its first line is the number of images and its second line the header. Queries and gallery show the same items.
"""

from __future__ import annotations

from pathlib import Path

from selfsup_xbn.data.base import ImageData
from selfsup_xbn.data.datasets.annotations import (
    ImageFolders,
    Sample,
    data_folder,
    find_file,
    quoted,
    read_lines,
    read_table,
    retrieval_data,
)
from selfsup_xbn.errors import UserError

LIST = "list_eval_partition.txt"
COLUMNS = "image_name item_id evaluation_status"
OFFICIAL = {"train": (25_882, 3_997), "query": (14_218, 3_985), "gallery": (12_612, 3_985)}


def load(name: str, path: str, *, root: str, **_: object) -> ImageData:
    """Load In-Shop from ``list_eval_partition.txt`` and ``img``.

    The list may also be in the folder ``Eval`` or ``Anno``, and ``img`` in the folder ``Img``.

    Args:
        name: The name of the data set.
        path: The folder of the data set, or "" for the folder ``name`` in ``root``.
        root: The folder of all data sets.

    Raises:
        UserError: If the list is missing or malformed, or an image is missing.
    """
    folder = data_folder(name, path, root)
    file = find_file(LIST, (folder, folder / "Eval", folder / "Anno"))
    images = ImageFolders(folder, folder / "Img")
    parts: dict[str, list[Sample]] = {part: [] for part in OFFICIAL}
    for where, (image, item, status) in read_table(file, COLUMNS, numbers=0, header=2):
        if status not in parts:
            raise UserError(
                f"{where}: expected evaluation_status to be one of {', '.join(parts)}, got {quoted(status)}"
            )
        parts[status].append(Sample(where, images.find(where, image), item))
    _check_count(file, sum(map(len, parts.values())))
    return retrieval_data(f"{name}:{folder}", parts, OFFICIAL)


def _check_count(file: Path, rows: int) -> None:
    count = read_lines(file)[0].strip()
    if count != str(rows):
        raise UserError(f"{file}:1: expected {rows}, the number of rows, got {quoted(count)}; correct the number")
