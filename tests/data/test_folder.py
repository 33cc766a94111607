from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup_xbn.data import load_data
from selfsup_xbn.data import workers as reading
from selfsup_xbn.data.datasets import cifar
from selfsup_xbn.errors import UserError

SMALL, WIDE, LARGE = (12, 12), (20, 14), (400, 300)


def pixels(path: Path | str) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_one_size_are_in_memory_sorted_by_name(tree, monkeypatch, workers):
    monkeypatch.setattr(reading, "CHUNK", 25)  # files that a worker reads at once
    root = tree(train={"cat": [SMALL] * 2, "ant": [SMALL] * 60}, test={"ant": [SMALL], "cat": [SMALL] * 2})
    data = load_data(f"folder:{root}", workers=workers)
    assert data.classes == ["ant", "cat"]
    assert data.train.labels.tolist() == [0] * 60 + [1] * 2
    assert data.test.labels.tolist() == [0, 1, 1]
    assert not data.disjoint
    files = sorted((root / "train").rglob("*.png"))
    for i in (0, 24, 25, 61):
        assert torch.equal(data.train.images[i], pixels(files[i]))
    assert torch.equal(data.test.images[2], pixels(root / "test/cat/001.png"))


def test_images_of_several_sizes_stay_files(tree):
    root = tree(train={"ant": [SMALL, WIDE, WIDE]}, test={"ant": [SMALL, WIDE]})
    data = load_data(f"folder:{root}")
    assert data.train.images is None
    assert data.train.paths == sorted(str(path) for path in (root / "train").rglob("*.png"))
    assert data.image_size == 14  # the median of the shorter sides


def test_images_that_exceed_the_cache_stay_files(tree):
    root = tree(train={"ant": [SMALL] * 3}, test={"ant": [SMALL]})
    need = 4 * 3 * 12 * 12
    assert load_data(f"folder:{root}", cache_bytes=need).train.images is not None
    assert load_data(f"folder:{root}", cache_bytes=need - 1).train.images is None


def test_test_classes_follow_on_from_the_training_classes(tree):
    root = tree(train={"b": [SMALL], "d": [SMALL]}, test={"a": [SMALL], "c": [SMALL]})
    data = load_data(f"folder:{root}")
    assert data.disjoint
    assert data.classes == ["b", "d", "a", "c"]
    assert data.test.labels.tolist() == [2, 3]
    assert data.num_classes == 4


def test_partly_shared_classes_make_a_union(tree):
    root = tree(train={"b": [SMALL], "d": [SMALL]}, test={"a": [SMALL], "b": [SMALL]})
    data = load_data(f"folder:{root}")
    assert not data.disjoint
    assert data.classes == ["b", "d", "a"]
    assert data.test.labels.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("size", "side", "augmentation"), [(SMALL, 12, "cifar"), (WIDE, 14, "cifar"), (LARGE, 224, "photo")]
)
def test_side_and_augmentation_suit_the_images(tree, size, side, augmentation):
    data = load_data(f"folder:{tree(train={'ant': [size]}, test={'ant': [size]})}")
    assert (data.image_size, data.augmentation) == (side, augmentation)
    assert (data.mean == cifar.MEAN) == (side <= 64)


def test_folders_in_folders_are_a_class_each_with_joined_names(tree):
    root = tree(train={"ant/x": [SMALL], "ant/y": [SMALL, SMALL], "bee": [SMALL]}, test={"ant/y": [SMALL]})
    (root / "train/ant/notes.txt").write_text("x")
    (root / "train/ant/.hidden.png").write_text("x")
    (root / "train/.cache").mkdir()
    data = load_data(f"folder:{root}")
    assert data.classes == ["ant/x", "ant/y", "bee"]
    assert data.train.labels.tolist() == [0, 1, 1, 2]
    assert data.test.labels.tolist() == [1]


@pytest.mark.parametrize("size", [SMALL, WIDE])
def test_broken_file_is_named_when_the_tree_is_opened(tree, monkeypatch, size):
    monkeypatch.setattr(reading, "CHUNK", 25)
    root = tree(train={"ant": [SMALL] * 60}, test={"ant": [size]})
    (root / "train/ant/055.png").write_bytes(b"\x89PNG\r\n\x1a\n rubbish")
    with pytest.raises(UserError, match=r"^\S*train/ant/055.png: [^\n]*$"):
        load_data(f"folder:{root}", workers=2)


def test_missing_parts_are_named(tree, tmp_path):
    root = tree(train={"ant": [SMALL], "bee": []}, test={"ant": [SMALL]})
    with pytest.raises(UserError, match=r"train/bee: expected at least one image"):
        load_data(f"folder:{root}")
    os.rmdir(root / "train/bee")
    os.rename(root / "train", root / "extra")
    with pytest.raises(UserError, match="expected training images in train, got only test"):
        load_data(f"folder:{root}")
    os.rename(root / "extra", root / "train")
    os.rename(root / "test", root / "gallery")
    with pytest.raises(UserError, match="expected query beside gallery, got none"):
        load_data(f"folder:{root}")
    os.mkdir(root / "test")
    with pytest.raises(UserError, match="photos/test: expected one folder per class, got none"):
        load_data(f"folder:{root}")
    with pytest.raises(UserError, match="write folder:PATH"):
        load_data("folder")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_data(f"folder:{tmp_path}/nowhere")


def test_real_photos_open_as_files_with_disjoint_classes():
    real = os.environ.get("SELFSUP_XBN_DATA")
    if not real:
        pytest.skip("SELFSUP_XBN_DATA names no folder of real data")
    data = load_data(f"folder:{real}/cars196", workers=1)
    assert (len(data.train), len(data.test)) == (4052, 4092)
    assert data.disjoint
    assert data.num_classes == 196
    assert data.train.images is None
    assert data.image_size == 96
