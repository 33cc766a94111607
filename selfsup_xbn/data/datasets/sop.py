"""Stanford Online Products (Song et al., 2016): photos of products by sellers on eBay.

https://cvgl.stanford.edu/projects/lifted_struct/. ``Ebay_train.txt`` and ``Ebay_test.txt`` list the images. Each test
image is a query against the other test images. The usual metrics are Recall@1, 10, 100 and 1000.
"""

from __future__ import annotations

from pathlib import Path

from selfsup_xbn.data.base import ImageData
from selfsup_xbn.data.datasets.annotations import (
    ImageFolders,
    Sample,
    data_folder,
    find_file,
    read_table,
    retrieval_data,
)

COLUMNS = "image_id class_id super_class_id path"
OFFICIAL = {"train": (59_551, 11_318), "test": (60_502, 11_316)}


def load(name: str, path: str, *, root: str, **_: object) -> ImageData:
    """Load Stanford Online Products from its lists and images.

    Args:
        name: The name of the data set.
        path: The folder that contains the lists or the folder ``Stanford_Online_Products`` with them, or "" for the
            folder ``name`` in ``root``.
        root: The folder of all data sets.

    Raises:
        UserError: If a list is missing or malformed, or an image is missing.
    """
    folder = data_folder(name, path, root)
    folders = folder, folder / "Stanford_Online_Products"
    images = ImageFolders(*folders)
    lists = {part: find_file(f"Ebay_{part}.txt", folders) for part in OFFICIAL}
    return retrieval_data(f"{name}:{folder}", {part: _samples(file, images) for part, file in lists.items()}, OFFICIAL)


def _samples(file: Path, images: ImageFolders) -> list[Sample]:
    rows = read_table(file, COLUMNS, numbers=3, header=1)
    return [Sample(where, images.find(where, image), int(label)) for where, (_, label, _, image) in rows]
