"""Inputs that ``bad_input.py`` damages: valid files of each kind, their reader, and an independent count of rows."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from scipy.io import whosmat
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from experiments.benchmarks.official_layouts import WRITERS, blank_image
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.config.schema import PretrainConfig, resolved
from selfsup_xbn.data import ImageData, eval_batches, load_data
from selfsup_xbn.report.curves import result_lines
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_config, read_metrics
from selfsup_xbn.training.run import Run


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        write: Writes valid files into an empty folder.
        spoiled: Pattern of the files of which one is damaged.
        read: Reads the folder as the program does; returns the number of rows.
        count: Returns the number of rows of a folder that was read without error, counted another way.
    """

    write: Callable[[Path], Any]
    spoiled: str
    read: Callable[[Path], int]
    count: Callable[[Path], int]


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
    return sum(file.suffix in IMG_EXTENSIONS for file in folder.rglob("*"))


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


# ------------------------------------------------------------------------------------------------------- run folders


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(resolved(RECIPES["sop"]) | {"environment": {}}, indent=2))


def count_options(folder: Path) -> int:
    """Return the number of all options if the file has those that every version wrote and that change results."""
    config = RECIPES["sop"]
    names = json.loads((folder / "config.json").read_bytes()).keys()
    needed = {
        item.name for item in fields(config) if item.metadata["affects_results"] and not item.metadata["added_later"]
    }
    return len(resolved(config)) if needed <= names else 0


def write_metrics(folder: Path) -> None:
    records = [{"epoch": n, "loss": 3.25 / (n + 1), "knn_top1": 50.5 + n, "drift": None, "gain": 1} for n in range(6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def read_and_show_metrics(folder: Path) -> int:
    result_lines(folder)
    return len(read_metrics(folder))


def count_records(folder: Path) -> int:
    content = (folder / "metrics.jsonl").read_bytes()
    return content.count(b"\n") + (not content.endswith(b"\n"))


@cache
def small_run() -> Run:
    """Return a run; building it takes longer than loading its state, so it is built once."""
    return Run(
        PretrainConfig(
            backbone="convnet-digits", limit_train=32, batch_size=16, queue_size="16", dim=4, epochs=3, knn_k=5
        )
    )


@cache
def small_state() -> bytes:
    """Return a pickled checkpoint in the middle of an epoch."""
    run = small_run()
    run.train_step(next(run.batches.epoch(0)))
    return pickle.dumps(run.state_dict() | {"log_bytes": 7})


def write_checkpoint(folder: Path) -> None:
    checkpoint.save(pickle.loads(small_state()), folder)


def read_checkpoint(folder: Path) -> int:
    small_run().load_state_dict(checkpoint.load(folder))
    return 1


VALID = b"as it was written"


def read_state(folder: Path) -> int:
    """Read a checkpoint with a valid checksum and one changed value, as another version may have written it.

    The damaged file is the seed that chooses the value.
    """
    state, seed = pickle.loads(small_state()), (folder / "seed").read_bytes()
    if seed != VALID:
        change_one(state, random.Random(seed))
    checkpoint.save(state, folder)
    return read_checkpoint(folder)


def change_one(place: Any, rng: random.Random) -> None:
    """Replace or delete one value of nested mappings and lists."""
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.9:
        change_one(place[key], rng)
    elif rng.random() < 0.3:
        del place[key]
    else:
        numbers = (-1, 10**30, 2.5, math.nan, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64))
        place[key] = rng.choice((None, "x", [], {}, *numbers))


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
    "config.json": Target(write_config, "*", lambda folder: len(resolved(read_config(folder))), count_options),
    "metrics.jsonl": Target(write_metrics, "*", read_and_show_metrics, count_records),
    "checkpoint": Target(write_checkpoint, "*.pt", read_checkpoint, lambda folder: 1),
    "checkpoint's values": Target(
        lambda folder: (folder / "seed").write_bytes(VALID), "seed", read_state, lambda folder: 1
    ),
}
