"""Inputs that ``bad_input.py`` damages: valid files of each kind, their reader, and an independent count of rows."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from scipy.io import whosmat
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from experiments.benchmarks.official_layouts import WRITERS, blank_image
from selfsup_xbn.data import ImageData, eval_batches, load_data
from tests.robustness import bad_input_runs as runs
from tests.robustness.bad_input_target import VALID, Target, seeded


def rows(data: ImageData) -> int:
    """Return the number of samples of all splits."""
    return len(data.train) + len(data.test) + (len(data.gallery) if data.gallery else 0)


# ---------------------------------------------------------------------------------------------- retrieval benchmarks


def benchmark(name: str, scale: float, spoiled: str, count: Callable[[Path], int]) -> Target:
    """Return a benchmark in its official layout at a share of its size; images are empty files, only lists are read."""
    return Target(lambda folder: WRITERS[name](folder, scale, b""), spoiled, lambda folder: opened(name, folder), count)


def opened(name: str, folder: Path) -> int:
    """Return the number of rows of a data set, read with an empty user cache."""
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder / "cache")}):
        return rows(load_data(f"{name}:{folder}", workers=0))


def lines_in(pattern: str, headers: int) -> Callable[[Path], int]:
    """Return a function that counts the lines that are not blank, without the first ones of each file."""

    def count(folder: Path) -> int:
        files = [file.read_bytes().decode().split("\n") for file in folder.glob(pattern)]
        return sum(sum(bool(line.strip()) for line in lines) - headers for lines in files)

    return count


def count_cars(folder: Path) -> int:
    """Return the number of annotations in the header of the file."""
    return next(math.prod(shape) for name, shape, _ in whosmat(folder / "cars_annos.mat") if name == "annotations")


SIDE = Image.open(BytesIO(blank_image())).width


def count_items(folder: Path) -> int:
    """Count DeepFashion2's items with a pixel of the image: those with a style, in validation also those of shops."""
    items = 0
    for file in folder.glob("*/annos/*.json"):
        content = json.loads(file.read_bytes())
        for key, item in content.items():
            if key.startswith("item") and key[4:].isdecimal():
                x1, y1, x2, y2 = (min(max(round(value), 0), SIDE) for value in item["bounding_box"])
                from_shop = file.parts[-3] == "validation" and content["source"] == "shop"
                items += x1 < x2 and y1 < y2 and (from_shop or item["style"] > 0)
    return items


def open_deepfashion2(folder: Path) -> int:
    """Delete the cache, then read: two changes may fall into one tick of the file system's clock."""
    for file in folder.glob("*/*.npz"):
        file.unlink()
    return opened("deepfashion2", folder)


def write_cached_deepfashion2(folder: Path) -> None:
    WRITERS["deepfashion2"](folder, 0.0005, b"")
    open_deepfashion2(folder)


# ------------------------------------------------------------------------------------------------------- image files


def write_tree(folder: Path, size: tuple[int, int] = (9, 7)) -> None:
    """Write three images of one size in each of four classes."""
    rng = np.random.default_rng(0)
    for label in ("train/a", "train/b", "test/c", "test/d"):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")


def write_mixed_tree(folder: Path) -> None:
    """Write images of several sizes and formats, which are read one by one."""
    write_tree(folder)
    for number, ending in enumerate(("jpg", "bmp", "webp", "tiff", "ppm")):
        Image.new("RGB", (8 + number, 6), (number, 9, 9)).save(folder / f"train/a/other.{ending}")


def read_images(name: str, folder: Path) -> int:
    """Decode every image as an evaluation does; return their number."""
    data = load_data(f"{name}:{folder}", workers=0)
    return sum(len(batch) for part in (data.train, data.test) for batch in eval_batches(part, data, batch_size=2))


def count_images(folder: Path) -> int:
    return sum(file.suffix in IMG_EXTENSIONS and file.is_file() for file in folder.rglob("*"))


def write_evil_tree(folder: Path) -> None:
    """Write images whose classes and files have names with terminal escapes."""
    write_tree(folder)
    for part in ("train", "test"):
        for place in sorted((folder / part).rglob("*"), reverse=True):
            place.rename(place.with_name(f"\x1b[2J\x07\u202e{place.name}"))


def read_links(folder: Path) -> int:
    """Read image folders with links in a training class to folders and images of the training set, or above them.

    The damaged file is the seed that draws the links.
    """
    seed, links = (folder / "seed").read_bytes(), folder / "train/a"
    rng = random.Random(seed)
    targets = ("..", "../..", "../../..", ".", "../b", "../../test", "../../test/c", "../b/0.png", "1.png", "/")
    for number in range(0 if seed == VALID else rng.randint(1, 4)):
        (links / f"link{number}.png").symlink_to(rng.choice(targets))
    try:
        return read_images("folder", folder)
    finally:
        for link in links.glob("link*"):
            link.unlink()


def write_cifar(folder: Path) -> None:
    """Write three files in CIFAR-10's format, and their checksums."""
    (folder / "cifar-10-batches-py").mkdir()
    rng = np.random.default_rng(0)
    parts = {name: rng.integers(0, 256, (number, 3072), np.uint8) for name, number in (("a", 4), ("b", 2))}
    contents: dict[str, Any] = {name: {"data": part, "labels": list(range(len(part)))} for name, part in parts.items()}
    for name, content in (contents | {"meta": {"names": list("abcd")}}).items():
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
    digests = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.glob("*/*")}
    (folder / "md5.json").write_text(json.dumps(digests))


def read_cifar(folder: Path) -> int:
    """Read with the checksums of the files as written in place of the official ones, and without a network."""
    digests = json.loads((folder / "md5.json").read_text())
    meta = {"filename": "meta", "key": "names", "md5": digests["meta"]}
    lists: dict[str, Any] = {"train_list": [["a", digests["a"]]], "test_list": [["b", digests["b"]]], "meta": meta}
    download = mock.patch(f"{datasets.CIFAR10.__module__}.download_and_extract_archive", side_effect=OSError("offline"))
    with mock.patch.multiple(datasets.CIFAR10, **lists), download:
        return rows(load_data(f"cifar10:{folder}"))


TARGETS = {
    "sop": benchmark("sop", 0.0005, "Ebay_*.txt", lines_in("Ebay_*.txt", 1)),
    "inshop": benchmark("inshop", 0.0005, "Eval/*.txt", lines_in("Eval/*.txt", 2)),
    "cub200": benchmark("cub200", 0.002, "*.txt", lines_in("images.txt", 0)),
    "cars196": benchmark("cars196", 0.002, "*.mat", count_cars),
    "deepfashion2": Target(
        lambda folder: WRITERS["deepfashion2"](folder, 0.0005, b""), "*/annos/*.json", open_deepfashion2, count_items
    ),
    "deepfashion2, cache": Target(
        write_cached_deepfashion2, "train/*.npz", lambda folder: opened("deepfashion2", folder), count_items
    ),
    "omniglot": Target(
        write_tree, "*/*/*", lambda folder: read_images("omniglot", folder), lambda folder: 4 * count_images(folder)
    ),
    "folder": Target(write_mixed_tree, "*/*/*", lambda folder: read_images("folder", folder), count_images),
    "folder in memory": Target(write_tree, "*/*/*", lambda folder: read_images("folder", folder), count_images),
    "cifar10": Target(write_cifar, "cifar-10-batches-py/*", read_cifar, lambda folder: 6),
    "links": seeded(read_links, lambda folder: 12, write_tree),
    "names with escapes": Target(write_evil_tree, "*/*/*", lambda folder: read_images("folder", folder), count_images),
    **runs.TARGETS,
}
