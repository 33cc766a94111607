"""Rendered characters: what the images are, which characters are left out, and the split."""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np
import pytest
import torch

from selfsup_xbn.data import load_data
from selfsup_xbn.data.datasets import glyphs
from selfsup_xbn.errors import UserError
from tests.fixtures import without_checks


@pytest.fixture(scope="module", params=["glyphs", pytest.param("glyphs-jittered", marks=pytest.mark.slow)])
def data(request):
    with without_checks():  # of 28,000 renderings
        return load_data(request.param)


def test_classes_are_disjoint_characters_each_with_enough_images(data):
    train, test = data.train.labels.unique(), data.test.labels.unique()
    assert not set(train.tolist()) & set(test.tolist())
    assert torch.equal(torch.cat([train, test]), torch.arange(len(data.classes)))
    assert len(set(data.classes)) == len(data.classes)
    counts = torch.cat([data.train.labels, data.test.labels]).bincount()
    assert counts.min() >= glyphs.DISTINCT_RENDERINGS
    assert counts.max() <= len(glyphs.FONTS)
    assert 0.6 < len(train) / len(data.classes) < 0.73


def test_split_of_known_characters_is_fixed(data):
    train = data.classes[: len(data.train.labels.unique())]
    assert "".join(character for character in "ABCDEFGHJKLMN" if character in train) == "ABCDEFJMN"


def test_images_are_gray_levels_normalized_by_the_constants(data):
    pixels = data.train.images.double() / 255
    assert data.train.images.shape[1:] == (1, 28, 28)
    assert pixels.mean().item() == pytest.approx(data.mean[0], abs=0.005)
    assert pixels.std().item() == pytest.approx(data.std[0], abs=0.005)
    assert data.train.images.flatten(1).any(1).all()


def test_marks_and_modifiers_are_no_characters(data):
    categories = {unicodedata.category(character) for character in data.classes}
    assert not categories & {"Mn", "Mc", "Me", "Sk", "Lm", "Zs", "Cn"}


def test_one_of_characters_that_look_alike_is_kept(data):
    # Latin, Greek and Cyrillic capital letters with the same shape
    for alike in ("AΑА", "BΒВ", "OΟО", "XΧХ", "TΤТ"):
        assert sum(character in data.classes for character in alike) == 1, alike


def test_first_of_alike_compares_within_a_font():
    images = torch.zeros(4, 2, 1, 3, dtype=torch.uint8)
    images[0, :, 0] = torch.tensor([255, 0, 0])
    images[1, 0, 0], images[1, 1, 0] = torch.tensor([0, 255, 0]), torch.tensor([200, 0, 0])  # like 0 in one font
    images[2, :, 0] = torch.tensor([0, 255, 0])  # like 1, which is left out
    images[3, 0, 0] = torch.tensor([255, 100, 0])  # cosine 0.93 with 0, black in the other font
    assert glyphs.first_of_alike(images).tolist() == [True, False, True, True]


def test_digest_is_that_of_images_and_labels(data):
    digest = hashlib.sha256()
    for split in (data.train, data.test):
        digest.update(split.images.numpy().tobytes() + split.labels.numpy().tobytes())
    assert data.digest == digest.hexdigest()


@pytest.mark.slow
def test_both_data_sets_have_the_same_characters():
    upright, jittered = load_data("glyphs"), load_data("glyphs-jittered")
    assert upright.classes == jittered.classes
    assert torch.equal(upright.train.labels, jittered.train.labels)
    assert not torch.equal(upright.train.images, jittered.train.images)
    assert upright.digest != jittered.digest


def test_random_changes_are_the_same_each_time(data):
    images = data.train.images[:3, 0]
    one, same, other = (glyphs._changed(character, images) for character in "AAB")
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, images)


def test_changes_of_a_rendering_stay_within_their_bounds():
    uniform = torch.rand(200, 5, dtype=torch.float64)
    for row in uniform.numpy():
        _, (a, b, _, c, d, _), _ = glyphs._map(row)
        linear = torch.tensor([[a, b], [c, d]], dtype=torch.float64)
        scale = torch.det(linear) ** -0.5  # rotation and shear keep areas
        assert glyphs.ZOOM[0] <= scale <= glyphs.ZOOM[1]
        assert abs(torch.rad2deg(torch.atan2(linear[1, 0], linear[0, 0]))) <= glyphs.DEGREES
    _, (a, b, x, c, d, y), _ = glyphs._map(np.array([0.5, 0.5, 0.5, 0.5, 2 / 3]))
    assert (a, b, x, c, d, y) == pytest.approx((1, 0, 0, 0, 1, 0), abs=1e-6)  # nothing changes


def test_glyphs_take_no_path():
    with pytest.raises(UserError, match=r"glyphs:/x: .* write glyphs"):
        load_data("glyphs:/x")


def test_missing_fonts_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match="expected the fonts of matplotlib in"):
        glyphs._rendered()
