from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selfsup_xbn.data import ImageData, Split, eval_batches, load_data
from selfsup_xbn.data.datasets import deepfashion2
from selfsup_xbn.errors import UserError
from tests.official import fault, official, photo

SMALL = 0.00025  # about the smallest share with items of every kind
CACHE = "annos.selfsup_xbn.npz"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def items(part: Path) -> list[tuple[str, tuple[int, int, int], str, list[int]]]:
    """(source, label, image, box) of each item, by name of the file."""
    found = []
    for file in sorted((part / "annos").iterdir()):
        content = json.loads(file.read_text())
        for key, item in content.items():
            if key.startswith("item"):
                label = content["pair_id"], item["category_id"], item["style"]
                found.append((content["source"], label, f"{part}/image/{file.stem}.jpg", item["bounding_box"]))
    return found


def check(data: ImageData, split: Split, expected: list) -> None:
    assert split.paths == [image for *_, image, _ in expected]
    assert split.boxes.tolist() == [box for *_, box in expected]
    names = [data.classes[label].split()[1] for label in split.labels]
    assert names == ["-".join(map(str, label)) for _, label, *_ in expected]


@pytest.mark.parametrize(
    ("workers", "scale", "samples", "labels"),
    [(0, 0.0005, (109, 6, 18), (16, 2, 4)), (2, 0.001, (218, 12, 37), (32, 3, 7))],
)
def test_queries_are_users_styled_items_gallery_is_shops(tmp_path, monkeypatch, workers, scale, samples, labels):
    monkeypatch.setattr(deepfashion2, "CHUNK", 100)  # files that a worker reads at once
    data = load_data(official("deepfashion2", tmp_path, scale), workers=workers)
    train, validation = items(tmp_path / "train"), items(tmp_path / "validation")
    check(data, data.train, [item for item in train if item[1][2] > 0])
    check(data, data.test, [item for item in validation if item[0] == "user" and item[1][2] > 0])
    check(data, data.gallery, [item for item in validation if item[0] == "shop"])
    splits = data.train, data.test, data.gallery
    assert tuple(map(len, splits)) == samples
    assert tuple(len(split.labels.unique()) for split in splits) == labels
    assert set(data.test.labels.tolist()) <= set(data.gallery.labels.tolist())
    assert data.train.labels.max() < data.gallery.labels.min()
    assert data.disjoint


def test_each_sample_is_the_crop_of_its_box(tmp_path):
    spec = official("deepfashion2", tmp_path, SMALL, photo())
    data = load_data(spec, workers=0)
    first = next(eval_batches(data.gallery, data, batch_size=1))[0]
    crop = Image.open(data.gallery.paths[0]).crop(data.gallery.boxes[0].tolist())
    assert crop.size == (20, 10)
    # 10 pixels of height become 256, of which the middle 224 are seen.
    expected = np.asarray(crop.resize((512, 256), Image.Resampling.BILINEAR))[16:240, 144:368] / 255
    ours = first.permute(1, 2, 0) * torch.tensor(data.std) + torch.tensor(data.mean)
    assert np.abs(ours.numpy() - expected).max() < 0.01


@pytest.mark.parametrize("box", [[5, 5, 5, 9], [500, 0, 510, 9], [0, -9, 9, 0], [600, 700, 800, 900]])
def test_boxes_without_a_pixel_are_left_out_with_a_warning(tmp_path, box):
    spec = official("deepfashion2", tmp_path, SMALL)
    before = len(load_data(spec, workers=0).train)
    rewrite(tmp_path / "train/annos/000001.json", bounding_box=box)
    data = load_data(spec, workers=0)
    assert len(data.train) == before - 1
    assert f"warning: {tmp_path}/train: 1 boxes that are empty or outside of their image are ignored" in data.notes
    assert sum(len(batch) for batch in eval_batches(data.train, data)) == before - 1


def test_boxes_are_clipped_to_the_upright_image(tmp_path):
    spec = official("deepfashion2", tmp_path, SMALL)
    rewrite(tmp_path / "train/annos/000001.json", bounding_box=[-5, 60, 999, 999])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (90, 40)).save(tmp_path / "train/image/000001.jpg", exif=exif)
    data = load_data(spec, workers=0)
    assert data.train.boxes[0].tolist() == [0, 60, 40, 90]


def test_image_that_is_no_image_is_named_on_opening(tmp_path):
    spec = official("deepfashion2", tmp_path, SMALL)
    (tmp_path / "validation/image/000001.jpg").write_bytes(b"")
    assert fault(spec).startswith(f"{tmp_path}/validation/image/000001.jpg: not a readable image")


def test_cache_that_unpacks_to_more_than_its_sources_is_not_read(tmp_path, monkeypatch):
    spec = official("deepfashion2", tmp_path, SMALL)
    before = load_data(spec, workers=0)
    cache = tmp_path / "train" / CACHE
    with np.load(cache) as archive:
        fingerprint, table = archive["fingerprint"], archive["table"]
    bomb = np.concatenate([table, np.zeros((200_000, table.shape[1]), np.int32)])
    np.savez_compressed(cache, fingerprint=fingerprint, table=bomb)
    assert cache.stat().st_size < len(bomb) < bomb.nbytes
    data, read = read_files(spec, monkeypatch)
    assert read > 0
    assert same(before, data)


def rewrite(file: Path, **changes: object) -> None:
    """Changes the values of item1."""
    content = json.loads(file.read_text())
    content["item1"] |= changes
    file.write_text(json.dumps(content))


def read_files(spec: str, monkeypatch) -> tuple[ImageData, int]:
    """The data, and how many annotation files were read for it."""
    counts, original = Counter(), deepfashion2.read_items
    with monkeypatch.context() as patch:
        patch.setattr(deepfashion2, "read_items", lambda file: counts.update([file]) or original(file))
        return load_data(spec, workers=0), counts.total()


def same(one: ImageData, other: ImageData) -> bool:
    return all(
        a.paths == b.paths and torch.equal(a.labels, b.labels) and torch.equal(a.boxes, b.boxes)
        for a, b in ((one.train, other.train), (one.test, other.test), (one.gallery, other.gallery))
    )


def test_files_are_read_once(tmp_path, monkeypatch):
    spec = official("deepfashion2", tmp_path, SMALL)
    files = sum(len(list((tmp_path / part / "annos").iterdir())) for part in ("train", "validation"))
    first, read = read_files(spec, monkeypatch)
    assert read == files
    assert f"cached in {tmp_path}/train/{CACHE}" in first.notes[3]
    again, read = read_files(spec, monkeypatch)
    assert read == 0
    assert same(first, again)
    assert len(again.notes) == 3
    assert not list(tmp_path.rglob(".*"))  # no temporary file is left


@pytest.mark.parametrize("change", ["content", "time", "new", "gone"])
def test_change_of_the_files_is_noticed(tmp_path, monkeypatch, change):
    spec = official("deepfashion2", tmp_path, SMALL)
    before, _ = read_files(spec, monkeypatch)
    file = tmp_path / "validation/annos/000001.json"
    if change == "content":
        rewrite(file, bounding_box=[1, 2, 33, 44])
    elif change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "new":
        (tmp_path / "validation/annos/999999.json").write_text(file.read_text())
        shutil.copy(tmp_path / "validation/image/000001.jpg", tmp_path / "validation/image/999999.jpg")
    else:
        file.unlink()
    data, read = read_files(spec, monkeypatch)
    assert read == len(list((tmp_path / "validation/annos").iterdir()))
    assert f"{tmp_path}/validation/{CACHE} is damaged or out of date" in data.notes[3]
    assert same(before, data) == (change == "time")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 rubbish", b"\x93NUMPY", b"\x80\x04K\x01."])
def test_damaged_cache_is_replaced_with_a_note(tmp_path, monkeypatch, content):
    spec = official("deepfashion2", tmp_path, SMALL)
    before, _ = read_files(spec, monkeypatch)
    cache = tmp_path / "train" / CACHE
    whole = cache.read_bytes()
    for damaged in (content, whole[:-50], whole[:200] + b"\0\0\0" + whole[203:]):
        cache.write_bytes(damaged)
        data, read = read_files(spec, monkeypatch)
        assert read > 0
        assert same(before, data)
        assert "is damaged or out of date" in data.notes[3]
    assert read_files(spec, monkeypatch)[1] == 0


def test_cache_of_another_shape_or_with_pickles_is_not_used(tmp_path, monkeypatch):
    spec = official("deepfashion2", tmp_path, SMALL)
    load_data(spec, workers=0)
    cache = tmp_path / "train" / CACHE
    with np.load(cache) as archive:
        fingerprint, table = archive["fingerprint"], archive["table"]
    for other in (table[:, :8], table.astype(np.float32), table.ravel(), np.array([Trap(tmp_path / "sprung")])):
        np.savez(cache, fingerprint=fingerprint, table=other)
        assert read_files(spec, monkeypatch)[1] > 0
    assert not (tmp_path / "sprung").exists()


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_cache_goes_to_the_user_folder_if_data_is_read_only(tmp_path, monkeypatch):
    spec = official("deepfashion2", tmp_path, SMALL)
    for part in ("train", "validation"):
        (tmp_path / part / CACHE).mkdir()  # even root cannot replace a folder by a file
    first, _ = read_files(spec, monkeypatch)
    assert f"cached in {os.environ['XDG_CACHE_HOME']}/selfsup_xbn/" in first.notes[3]
    again, read = read_files(spec, monkeypatch)
    assert read == 0
    assert same(first, again)


def test_files_are_read_each_time_without_a_place_for_a_cache(tmp_path, monkeypatch):
    spec = official("deepfashion2", tmp_path, SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    for part in ("train", "validation"):
        (tmp_path / part / CACHE).mkdir()
    for _ in range(2):
        data, read = read_files(spec, monkeypatch)
        assert read > 0
        assert "not cached: no folder is writable" in data.notes[3]
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ":1: not valid JSON"),
        ('{"source": "user",\n "pair_id": }', ":2: not valid JSON"),
        ("[" * 100_000, ": cannot be read"),
        (b"\xff\xfe\x00", ": cannot be read"),
        ('{"source": "user", "pair_id": ' + "1" * 5000 + "}", ": cannot be read"),
        ("[1]", ": expected an object with source, pair_id, item1, ..., got [1]"),
        ('{"pair_id": 1}', ': expected source "user" or "shop", got None'),
        ('{"source": ["user"], "pair_id": 1}', ': expected source "user" or "shop", got [\'user\']'),
        ('{"source": "user"}', ": expected pair_id to be an integer from 0 to 2147483647, got None"),
        ('{"source": "user", "pair_id": true}', ": expected pair_id to be an integer from 0 to 2147483647, got True"),
        (
            '{"source": "user", "pair_id": 1, "item1": 3}',
            ": item1: expected an object with bounding_box, category_id and style, got 3",
        ),
        (
            '{"source": "user", "pair_id": 1, "item2": {"category_id": 99999999999}}',
            ": item2: expected category_id to be an integer from 0 to 2147483647, got 99999999999",
        ),
        (
            '{"source": "user", "pair_id": 1, "item2": {"category_id": 1, "style": -1}}',
            ": item2: expected style to be an integer from 0 to 2147483647, got -1",
        ),
        (
            '{"source": "user", "pair_id": 1, "item2": {"category_id": 1, "style": 1}}',
            ": item2: expected bounding_box to be [x1, y1, x2, y2] in pixels, got None",
        ),
    ],
)
def test_malformed_file_is_named_with_what_was_expected(tmp_path, content, message):
    spec = official("deepfashion2", tmp_path, SMALL)
    file = tmp_path / "validation/annos/000003.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert fault(spec).startswith(f"{file}{message}")
    assert len(fault(spec)) < 500


@pytest.mark.parametrize(
    "box", ["[1, 2, 3]", "[1, 2, 3, 4, 5]", '[1, 2, 3, "4"]', "[1, 2, NaN, 4]", "[1, 2, 1e400, 4]", "7"]
)
def test_malformed_box_is_named_with_its_item(tmp_path, box):
    spec = official("deepfashion2", tmp_path, SMALL)
    file = tmp_path / "train/annos/000002.json"
    item = f'{{"category_id": 1, "style": 1, "bounding_box": {box}}}'
    file.write_text(f'{{"source": "user", "pair_id": 1, "item7": {item}}}')
    assert fault(spec).startswith(f"{file}: item7: expected bounding_box to be [x1, y1, x2, y2] in pixels, got ")


def test_error_of_a_worker_has_the_same_text(tmp_path, monkeypatch):
    monkeypatch.setattr(deepfashion2, "CHUNK", 40)
    spec = official("deepfashion2", tmp_path, SMALL)
    file = tmp_path / "train/annos/000085.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=f'^{file}: expected source "user" or "shop", got None$'):
        load_data(spec, workers=2)
    assert not list(tmp_path.rglob("*.npz"))


def test_missing_image_or_folder_is_named_on_opening(tmp_path):
    spec = official("deepfashion2", tmp_path, SMALL)
    load_data(spec, workers=0)
    (tmp_path / "train/image/000017.jpg").unlink()
    assert fault(spec).startswith(
        f"{tmp_path}/train/annos/000017.json: image {tmp_path}/train/image/000017.jpg not found"
    )
    (tmp_path / "train/annos").rename(tmp_path / "train/elsewhere")
    assert fault(spec).startswith(f"{tmp_path}/train/annos: cannot be listed (No such file or directory)")
    (tmp_path / "train/annos").mkdir()
    assert fault(spec).startswith(f"{tmp_path}/train/annos: expected JSON files, got none")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ITEMS = st.fixed_dictionaries({}, optional=dict.fromkeys(("bounding_box", "category_id", "style"), VALUES))
CONTENTS = st.fixed_dictionaries(
    {}, optional={"source": st.just("user") | VALUES, "pair_id": st.just(1) | VALUES, "item1": ITEMS | VALUES}
)


@settings(max_examples=80)
@given(content=CONTENTS | VALUES, noise=st.binary(max_size=3), place=st.integers(0, 60), keep=st.booleans())
def test_any_file_is_read_into_int32_or_refused_by_name(tmp_path_factory, content, noise, place, keep):
    file = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(content).encode()
    file.write_bytes(text if keep else text[:place] + noise + text[place + 1 :])
    try:
        refusal, rows = str(file), deepfashion2.read_items(file)
    except UserError as error:
        refusal, rows = str(error), []
    assert str(file) in refusal
    assert "\n" not in refusal
    assert all(len(row) == 8 and torch.tensor(row).abs().max() < 2**31 for row in rows)
