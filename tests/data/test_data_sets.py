from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torchvision import datasets

from selfsup_xbn.data import eval_batches, limit, load_data, raw_pixels
from selfsup_xbn.errors import UserError


def test_digits_split_is_fixed_and_stratified():
    data, again = load_data("digits"), load_data("digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert torch.equal(data.train.images, again.train.images)
    assert torch.equal(data.test.labels, again.test.labels)
    share = data.train.labels.bincount() / (data.train.labels.bincount() + data.test.labels.bincount())
    assert (share - 0.8).abs().max() < 0.01
    assert data.num_classes == 10


def test_digits_are_scikit_learns_images_each_in_one_part():
    data, source = load_data("digits"), load_digits()
    ours = torch.cat([data.train.images, data.test.images]).flatten(1).numpy()
    theirs = np.round(source.images.reshape(1797, 64) * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))


def test_digits_are_normalized_to_mean_0_and_deviation_1():
    data = load_data("digits")
    pixels = torch.cat(list(eval_batches(data.train, data)))
    assert abs(pixels.mean()) < 0.01
    assert abs(pixels.std() - 1) < 0.01


def test_raw_digits_neighbors_are_about_98_percent_right():
    data = load_data("digits")
    neighbors = KNeighborsClassifier(5, metric="cosine").fit(raw_pixels(data.train), data.train.labels)
    assert 0.97 < neighbors.score(raw_pixels(data.test), data.test.labels) < 0.995


@pytest.mark.parametrize(("spec", "nearest"), [("digit", "digits"), ("cifar-10", "cifar10"), ("foldr:/x", "folder")])
def test_unknown_data_set_is_refused_with_the_nearest_name(spec, nearest):
    with pytest.raises(
        UserError,
        match=rf"unknown data set '{spec.split(':')[0]}': expected one of glyphs, .*cifar10.*did you mean {nearest}",
    ):
        load_data(spec)


def test_digits_take_no_path():
    with pytest.raises(UserError, match=r"digits:/x: .* write digits"):
        load_data("digits:/x")


def test_cifar_without_network_or_files_says_where_it_looked(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(
        UserError, match=r"cifar10 not found in \S*cifar-10-batches-py, .*no route.*put cifar-10-python.tar.gz"
    ):
        load_data("cifar10", root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "folder", "key"),
    [("cifar10", "cifar-10-batches-py", "labels"), ("cifar100", "cifar-100-python", "fine_labels")],
)
def test_cifar_is_read_from_files_that_are_there(tmp_path, monkeypatch, name, folder, key):
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), np.uint8)
    entries = {"train_list": ("a", rows[:4]), "test_list": ("b", rows[4:])}
    source = getattr(datasets, name.upper())
    (tmp_path / folder).mkdir()

    def write(file: str, content: dict) -> str:
        payload = pickle.dumps(content)
        (tmp_path / folder / file).write_bytes(payload)
        return hashlib.md5(payload).hexdigest()

    for part, (file, pixels) in entries.items():
        digest = write(file, {"data": pixels, key: list(range(len(pixels)))})
        monkeypatch.setattr(source, part, [[file, digest]])
    names = list("abcdef")
    digest = write("meta", {"names": names})
    monkeypatch.setattr(source, "meta", {"filename": "meta", "key": "names", "md5": digest})
    data = load_data(name, root=str(tmp_path))
    # The files hold a row of 1,024 reds, then greens, then blues.
    assert torch.equal(data.train.images, torch.from_numpy(rows[:4].reshape(4, 3, 32, 32)))
    assert torch.equal(data.test.images, torch.from_numpy(rows[4:].reshape(2, 3, 32, 32)))
    assert data.train.labels.tolist() == [0, 1, 2, 3]
    assert data.classes == names


def test_limit_draws_distinct_samples_the_same_for_a_seed():
    train = load_data("digits").train
    some = limit(train, 100, seed=3)
    assert len(some) == 100
    assert torch.equal(some.images, limit(train, 100, seed=3).images)
    assert not torch.equal(some.images, limit(train, 100, seed=4).images)
    assert limit(train, 5000, seed=3) is train
