from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from selfsup_xbn.data import ImageData, Split
from selfsup_xbn.data.augmentations import (
    CROP_NUMBERS,
    JITTER_NUMBERS,
    AffineViews,
    ColorViews,
    CropViews,
    memory_views,
    random_crop,
    random_jitter,
)
from selfsup_xbn.data.image_ops import BRIGHTNESS, CONTRAST, HUE, SATURATION
from selfsup_xbn.errors import UserError

MEAN, STD = (0.49, 0.48, 0.45), (0.20, 0.19, 0.21)
DRAWS = 20_000


def uniform(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def assert_same_distribution(ours, theirs) -> None:
    """Kolmogorov and Smirnov's test; the seeds are fixed, so it passes always or never."""
    assert stats.ks_2samp(np.asarray(ours), np.asarray(theirs)).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(40, 64), (32, 32)])
@pytest.mark.slow
def test_crops_have_torchvisions_distribution(height, width):
    torch.manual_seed(1)
    image = torch.zeros(1, height, width)
    theirs = np.array([T.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)])
    crop = random_crop(uniform(DRAWS, CROP_NUMBERS), height, width, (0.2, 1.0), 0.5)
    ours = torch.stack([crop.top, crop.left, crop.height, crop.width], 1).double().numpy()
    for column in range(4):
        assert_same_distribution(ours[:, column], theirs[:, column])
    assert_same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])
    assert abs(crop.flip.double().mean() - 0.5) < 0.02


def test_crops_stay_inside_and_a_long_image_gets_the_largest_box():
    crop = random_crop(uniform(1000, CROP_NUMBERS), 10, 200, (0.2, 1.0), 0.5)
    assert set(crop.height.tolist()) == {10.0}
    assert set(crop.width.tolist()) == {13.0}
    assert (crop.left + crop.width).max() <= 200
    assert crop.left.min() >= 0


def test_jitter_has_torchvisions_distribution():
    torch.manual_seed(1)
    ranges = ([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1])
    theirs = [T.ColorJitter.get_params(*ranges) for _ in range(DRAWS)]
    jitter = random_jitter(uniform(DRAWS, JITTER_NUMBERS), (0.4, 0.4, 0.4, 0.1), 1.0)
    for operation in (BRIGHTNESS, CONTRAST, SATURATION):
        assert_same_distribution(jitter.factors[:, operation], [draw[1 + operation] for draw in theirs])
    assert_same_distribution(jitter.hue, [draw[4] for draw in theirs])
    counts = torch.unique(jitter.order @ torch.tensor([64, 16, 4, 1]), return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_jitter_is_applied_to_the_given_share():
    jitter = random_jitter(uniform(DRAWS, JITTER_NUMBERS), (0.4, 0.4, 0.4, 0.1), 0.8)
    untouched = (jitter.factors == 1).all(1) & (jitter.hue == 0)
    assert abs(untouched.double().mean() - 0.2) < 0.01


def by_torchvision(image: torch.Tensor, numbers: torch.Tensor, views: ColorViews) -> torch.Tensor:
    """One view, from one row of random numbers, by torchvision's operations on one image."""
    crop = random_crop(numbers[None, :CROP_NUMBERS], *image.shape[1:], views.scale, views.flip)
    box = [int(side) for side in (crop.top, crop.left, crop.height, crop.width)]
    image = TF.resized_crop(image / 255, *box, [views.size, views.size], antialias=True)
    image = TF.hflip(image) if crop.flip else image
    for_jitter = numbers[None, CROP_NUMBERS : CROP_NUMBERS + JITTER_NUMBERS]
    jitter = random_jitter(for_jitter, views.jitter, views.jitter_probability)
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation
    for operation in jitter.order[0].tolist():
        if operation == HUE:
            image = TF.adjust_hue(image, float(jitter.hue))
        else:
            image = adjust[operation](image, float(jitter.factors[0, operation]))
    image = TF.rgb_to_grayscale(image, 3) if numbers[-3] < views.gray else image
    return TF.normalize(image, views.mean, views.std)


@pytest.mark.parametrize(("side", "size"), [(32, 32), (40, 24)])
def test_color_views_equal_torchvision_image_by_image(side, size):
    views = ColorViews(size, MEAN, STD)
    images = torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    numbers = uniform(64, views.numbers)
    expected = torch.stack([by_torchvision(image, row, views) for image, row in zip(images, numbers, strict=True)])
    torch.testing.assert_close(views(images, numbers), expected, atol=1e-4, rtol=0)


def test_blur_applies_to_its_share_of_views():
    images = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    numbers = uniform(200, ColorViews.numbers)
    plain, blurred = (ColorViews(16, MEAN, STD, blur=blur)(images, numbers) for blur in (0.0, 0.5))
    chosen = numbers[:, -2] < 0.5
    assert torch.equal(plain[~chosen], blurred[~chosen])
    sigma = 0.1 + 1.9 * numbers[:, -1]
    for i in (chosen & (sigma > 0.3)).nonzero()[:, 0].tolist():
        expected = TF.gaussian_blur(plain[i], [15, 15], [float(sigma[i])] * 2)
        middle = blurred[i, :, 7:9, 7:9]
        torch.testing.assert_close(middle, expected[:, 7:9, 7:9], atol=0.01, rtol=0)


def test_crop_views_of_the_whole_image_are_the_image():
    images = torch.randint(0, 256, (4, 1, 12, 12), dtype=torch.uint8)
    views = CropViews(12, (0.5,), (0.25,), scale=(1.0, 1.0), flip=0.0)
    numbers = uniform(4, CROP_NUMBERS)
    numbers[:, 10] = 0.5  # the first try's aspect is 1
    torch.testing.assert_close(views(images, numbers), (images / 255 - 0.5) / 0.25, atol=1e-5, rtol=0)


def test_affine_views_equal_scipys_interpolation():
    views = AffineViews(8, (0.3,), (0.4,))
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    numbers = uniform(20, views.numbers)
    result = views(images, numbers) * 0.4 + 0.3
    centers = (np.arange(8) + 0.5) / 4 - 1
    y, x = np.meshgrid(centers, centers, indexing="ij")
    for image, matrix, view in zip(images, views.matrix(numbers).double().numpy(), result, strict=True):
        source = matrix @ np.stack([x.ravel(), y.ravel(), np.ones(64)])
        place = (source[::-1] + 1) * 4 - 0.5
        expected = ndimage.map_coordinates(image[0].numpy() / 255, place, order=1, mode="grid-constant")
        np.testing.assert_allclose(view[0].numpy().ravel(), expected, atol=1e-5)


def test_affine_parameters_fill_their_ranges_around_identity():
    views = AffineViews(8, (0.3,), (0.4,), degrees=10.0, zoom=(0.5, 1.5), shift=0.1)
    torch.testing.assert_close(views.matrix(torch.full((1, 5), 0.5))[0], torch.eye(3)[:2])
    matrix = views.matrix(uniform(2000, 5)).double()
    zoom = matrix[:, :, 0].norm(dim=1) ** -1
    assert 0.5 <= zoom.min() < 0.51
    assert 1.49 < zoom.max() <= 1.5
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]).rad2deg()
    assert 9.9 < angle.abs().max() <= 10.001
    assert 0.199 < matrix[:, :, 2].abs().max() <= 0.2


def test_unsuitable_families_are_refused_with_the_choices():
    labels, images = torch.zeros(2, dtype=torch.long), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    gray = ImageData("gray", Split(labels, images), Split(labels, images))
    with pytest.raises(UserError, match=r"unknown augmentation 'cifra'.*digits, cifar"):
        memory_views("cifra", gray)
    with pytest.raises(UserError, match="needs color"):
        memory_views("photo", gray)


@pytest.mark.parametrize("channels", [1, 3])
def test_supervised_views_mirror_color_images_and_no_gray_ones(channels):
    images = torch.zeros(1, channels, 28, 28, dtype=torch.uint8)
    images[..., :14] = 255
    split = Split(torch.zeros(1, dtype=torch.long), images)
    data = ImageData("half", split, split, image_size=28, mean=(0.0,) * channels, std=(1.0,) * channels)
    views = memory_views("supervised", data)
    left, right = views(images.expand(200, -1, -1, -1), uniform(200, views.numbers))[:, 0].split(14, 2)
    mirrored = (left.sum((1, 2)) < right.sum((1, 2))).double().mean()
    assert mirrored == 0 if channels == 1 else 0.3 < mirrored < 0.7
