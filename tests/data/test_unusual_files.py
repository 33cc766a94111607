"""Files that are not regular, links, encodings and formats: nothing hangs, repeats images or is skipped silently."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from experiments.benchmarks.official_layouts import WRITERS
from selfsup_xbn.data import load_data
from selfsup_xbn.data.datasets import cars196
from selfsup_xbn.data.images import read_image
from selfsup_xbn.errors import UserError
from selfsup_xbn.utils.files import open_regular
from tests.command_line import image_folder
from tests.official import fault, official
from tests.robustness.bad_input import time_limit

LISTS = {
    "sop": "Ebay_train.txt",
    "inshop": "Eval/list_eval_partition.txt",
    "cub200": "image_class_labels.txt",
    "cars196": "cars_annos.mat",
    "deepfashion2": "train/annos/000001.json",
}


@pytest.fixture(autouse=True)
def _no_hang():
    with time_limit(20):
        yield


def characters(root: Path) -> Path:
    """Turn ``train`` and ``test`` into the official folders of Omniglot, with one alphabet each."""
    for part, official_name in (("train", "images_background"), ("test", "images_evaluation")):
        (root / official_name).mkdir()
        (root / part).rename(root / official_name / "Greek")
    return root


# ---------------------------------------------------------------- only regular files


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop", "missing"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "file"
    make = {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda p: p.symlink_to("/dev/zero")}
    make |= {"loop": lambda p: p.symlink_to(p), "missing": lambda p: None}
    make[kind](path)
    codes = {"loop": errno.ELOOP, "missing": errno.ENOENT}
    with pytest.raises(OSError, match=r".+") as caught:
        open_regular(path)
    assert caught.value.errno == codes.get(kind, errno.EINVAL)


def test_link_to_a_regular_file_is_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"


@pytest.mark.parametrize("name", ["folder", "cars196", "omniglot", "official omniglot"])
def test_fifo_among_the_images_is_skipped_with_a_note(tmp_path, name):
    root = image_folder(tmp_path, classes=("a",))
    image_folder(root / "other", classes=("b",))
    shutil.rmtree(root / "test")
    (root / "other" / "test").rename(root / "test")
    os.mkfifo(root / "train/a/9.png")
    part = "train"
    if name == "official omniglot":
        characters(root)
        part = "images_background/Greek"
    data = load_data(f"{name.split()[-1]}:{root}", workers=0)
    assert len(data.train) == 3 * (4 if "omniglot" in name else 1)
    assert f"warning: skipped, because not a regular file: 1, such as {root}/{part}/a/9.png" in data.notes


@pytest.mark.parametrize("name", LISTS)
def test_fifo_in_the_place_of_an_annotation_file_is_named(tmp_path, name):
    spec, file = official(name, tmp_path, 0.0005), tmp_path / LISTS[name]
    file.unlink()
    os.mkfifo(file)
    assert fault(spec).startswith(f"{file}: cannot be read (not a regular file)")


def test_fifo_in_the_place_of_a_listed_image_is_named(tmp_path):
    for name in LISTS:
        root = tmp_path / name
        root.mkdir()
        spec = official(name, root, 0.0005)
        image = next(path for path in sorted(root.rglob("*")) if path.suffix.lower() == ".jpg")
        image.unlink()
        os.mkfifo(image)
        assert image.name in fault(spec)


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("name", ["folder", "omniglot"])
@pytest.mark.parametrize("target", ["..", "../..", "../../test", "../../test/d", "../b", "../../..", "."])
def test_link_inside_the_data_set_repeats_no_image(tmp_path, name, target):
    root = disjoint(tmp_path / "photos")
    before = load_data(f"{name}:{root}", workers=0)
    (root / "train/a/up").symlink_to(target)
    data = load_data(f"{name}:{root}", workers=0)
    assert data.train.labels.equal(before.train.labels)
    assert data.train.images.equal(before.train.images)
    assert any("link to a folder" in note and f"{root}/train/a/up" in note for note in data.notes)


def disjoint(root: Path) -> Path:
    image_folder(root)
    for old, new in (("a", "c"), ("b", "d")):
        (root / "test" / old).rename(root / "test" / new)
    return root


def test_link_to_a_folder_elsewhere_is_visited_once(tmp_path):
    root, elsewhere = disjoint(tmp_path / "photos"), image_folder(tmp_path / "more") / "train/a"
    (elsewhere / "again").symlink_to(elsewhere)
    (elsewhere / "data set").symlink_to(root)
    (root / "train/a/more").symlink_to(elsewhere)
    (root / "train/b/more").symlink_to(elsewhere)
    data = load_data(f"folder:{root}", workers=0)
    assert data.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3  # a, a/more, b
    assert any(note.startswith("warning: skipped") and ": 3, such as" in note for note in data.notes)


def test_link_to_an_image_of_another_class_is_skipped(tmp_path):
    root = disjoint(tmp_path)
    (root / "train/a/9.png").symlink_to("../b/0.png")
    data = load_data(f"folder:{root}", workers=0)
    assert data.train.labels.tolist() == [0] * 3 + [1] * 3
    assert any("link to an image of the data set" in note for note in data.notes)


def test_class_folders_may_be_links_but_not_the_same_folder(tmp_path):
    root = disjoint(tmp_path / "photos")
    before = load_data(f"folder:{root}", workers=0)
    (root / "train/b").rename(tmp_path / "elsewhere")
    (root / "train/b").symlink_to(tmp_path / "elsewhere")
    assert load_data(f"folder:{root}", workers=0).train.labels.equal(before.train.labels)
    (root / "train/e").symlink_to("b")
    with pytest.raises(UserError, match=r"train/e and \S*train/b are the same folder"):
        load_data(f"folder:{root}", workers=0)


def test_images_that_are_links_into_a_common_store_are_read(tmp_path):
    root = disjoint(tmp_path)
    for number, file in enumerate(sorted(root.glob("*/*/*.png"))):
        file.rename(root / f"{number}.png")
        file.symlink_to(root / f"{number}.png")
    assert len(load_data(f"folder:{root}", workers=0).train) == 6


def test_dangling_link_and_loop_are_named(tmp_path):
    root = disjoint(tmp_path)
    for target, reason in (("nowhere.png", "No such file"), ("9.png", "Too many levels")):
        (root / "train/a/9.png").symlink_to(target)
        with pytest.raises(UserError, match=rf"train/a/9.png: .*{reason}"):
            load_data(f"folder:{root}", workers=0)
        (root / "train/a/9.png").unlink()


# ---------------------------------------------------------------- encodings and formats


@pytest.mark.parametrize("name", ["sop", "inshop", "cub200", "deepfashion2"])
def test_byte_order_mark_of_an_annotation_file_is_ignored(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec, file = official(name, tmp_path, 0.0005), tmp_path / LISTS[name]
    before = load_data(spec, workers=0)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    data = load_data(spec, workers=0)
    assert data.train.paths == before.train.paths
    assert data.train.labels.equal(before.train.labels)


def test_files_that_are_not_read_are_counted_by_format(tmp_path):
    root = disjoint(tmp_path)
    for name in ("a/x.gif", "a/y.GIF", "b/z.jfif", "b/z.avif", "b/notes", "a/.hidden"):
        (root / "train" / name).write_bytes(b"")
    (root / "test/loose.png").write_bytes(b"")
    first, second = load_data(f"folder:{root}", workers=0).notes
    assert first.startswith("warning: skipped, because not of a format that is read (.jpg ")
    for count in ("2 .gif", "1 .jfif", "1 .avif", "1 no extension"):
        assert count in first
    assert second == f"warning: skipped, because outside of a class folder: 1, such as {root}/test/loose.png"


def test_class_of_other_formats_only_is_refused_with_the_count(tmp_path):
    root = disjoint(tmp_path)
    (root / "train/e").mkdir()
    (root / "train/e/1.heic").write_bytes(b"")
    assert "train/e: expected at least one image" in fault(f"folder:{root}")
    assert "1 .heic" in fault(f"folder:{root}")


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.float32, "floating-point numbers"), (np.int32, "signed or 32-bit integers")]
)
def test_pixels_without_a_defined_range_are_refused(tmp_path, dtype, kind):
    path = tmp_path / "photos/train/a/9.tif"
    root = disjoint(tmp_path / "photos")
    Image.fromarray(np.ones((8, 8), dtype)).save(path)
    with pytest.raises(UserError, match=rf"9.tif: expected pixels of 8 or 16 bits, got {kind}"):
        read_image(str(path))
    assert fault(f"folder:{root}").startswith(f"{path}: expected pixels of 8 or 16 bits")
    Image.new("RGB", (9, 9)).save(root / "train/a/0.png")  # of several sizes only the headers are read
    assert fault(f"folder:{root}").startswith(f"{path}: expected pixels of 8 or 16 bits")


# ---------------------------------------------------------------- missing, damaged, too large


@pytest.mark.parametrize("name", ["sop", "inshop", "cub200", "cars196"])
def test_missing_annotation_file_is_called_missing(tmp_path, name):
    spec = official(name, tmp_path, 0.0005)
    if name == "cars196":
        (tmp_path / "devkit").mkdir()
        (tmp_path / "cars_annos.mat").rename(tmp_path / "devkit/cars_train_annos.mat")
        (tmp_path / "cars_train").mkdir()
        row = np.array([("1.jpg", 7)], [("fname", object), ("class", object)])
        savemat(tmp_path / "devkit/cars_train_annos.mat", {"annotations": row})
        (tmp_path / "cars_train/1.jpg").touch()
        assert fault(spec).startswith(f"{tmp_path}/cars_test_annos_withlabels.mat is missing")
        return
    (tmp_path / LISTS[name]).unlink()
    assert "is missing" in fault(spec) or " not found in " in fault(spec)


def test_annotations_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    WRITERS["cars196"](tmp_path, 0.002, b"")
    monkeypatch.setattr(cars196, "MAX_BYTES", 2**20)
    savemat(tmp_path / "cars_annos.mat", {"annotations": np.zeros(2**18)}, do_compression=True)
    assert (tmp_path / "cars_annos.mat").stat().st_size < 2**14
    assert "it unpacks to more than 1,048,576 bytes" in fault(f"cars196:{tmp_path}")


@pytest.mark.parametrize("place", ["archive", "file"])
def test_damaged_cifar_that_is_in_place_is_not_called_absent(tmp_path, monkeypatch, place):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    file = tmp_path / "cifar-10-python.tar.gz"
    if place == "archive":
        with tarfile.open(file, "w:gz"):
            pass
    else:
        file = tmp_path / "cifar-10-batches-py" / datasets.CIFAR10.train_list[2][0]
        file.parent.mkdir()
        file.write_bytes(b"half")
    refusal = fault(f"cifar10:{tmp_path}")
    assert refusal.startswith(f"{file} is damaged (its checksum differs), and the download failed")
    assert "not found" not in refusal
