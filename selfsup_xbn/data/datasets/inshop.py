"""DeepFashion's In-Shop Clothes Retrieval (Liu et al., 2016): clothes of a shop, in several photos each.

https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html. ``list_eval_partition.txt`` lists the images:
line 1 has their number, line 2 the columns. The queries are searched in the gallery, which shows the same items.
"""

from __future__ import annotations

from pathlib import Path

from selfsup_xbn.data.base import ImageData
from selfsup_xbn.data.datasets.annotations import (
    ImageFolders,
    Sample,
    find_file,
    home,
    read_lines,
    read_table,
    retrieval_data,
    shown,
)
from selfsup_xbn.errors import UserError

LIST = "list_eval_partition.txt"
COLUMNS = "image_name item_id evaluation_status"
OFFICIAL = {"train": (25_882, 3_997), "query": (14_218, 3_985), "gallery": (12_612, 3_985)}


def load(name: str, path: str, *, root: str, **_: object) -> ImageData:
    """The list is in the data set's folder, in ``Eval`` or in ``Anno``; the images are in ``img`` or in ``Img/img``.

    Raises:
        UserError: the list is missing or malformed, or an image is missing.
    """
    folder = home(name, path, root)
    file = find_file(LIST, (folder, folder / "Eval", folder / "Anno"))
    images = ImageFolders(folder, folder / "Img")
    parts: dict[str, list[Sample]] = {part: [] for part in OFFICIAL}
    for where, (image, item, status) in read_table(file, COLUMNS, numbers=0, header=2):
        if status not in parts:
            raise UserError(f"{where}: expected evaluation_status to be one of {', '.join(parts)}, got {shown(status)}")
        parts[status].append(Sample(where, images.find(where, image), item))
    _check_count(file, sum(map(len, parts.values())))
    return retrieval_data(f"{name}:{folder}", parts, OFFICIAL)


def _check_count(file: Path, rows: int) -> None:
    count = read_lines(file)[0].strip()
    if count != str(rows):
        raise UserError(f"{file}:1: expected {rows}, the number of rows, got {shown(count)}; correct the number")
