from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torchvision.transforms import functional as TF

from selfsup_xbn.data.image_ops import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Crop,
    Jitter,
    color_jitter,
    crop_resize,
    gaussian_blur,
    gray_and_normalize,
    normalize,
    shift_hue,
)

MEAN, STD = (0.49, 0.48, 0.45), (0.20, 0.19, 0.21)
ADJUST = {
    BRIGHTNESS: TF.adjust_brightness,
    CONTRAST: TF.adjust_contrast,
    SATURATION: TF.adjust_saturation,
    HUE: TF.adjust_hue,
}
ORDERS = list(permutations(range(4)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_images(generator: torch.Generator, count: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """Random pixels, the first image gray and the second black: hue and saturation are undefined there."""
    images = torch.rand(count, 3, height, width, generator=generator)
    images[0] = images[0, :1]
    images[1] = 0
    return images


def random_boxes(generator: torch.Generator, count: int, height: int, width: int) -> Crop:
    tall = torch.randint(1, height + 1, (count,), generator=generator)
    wide = torch.randint(1, width + 1, (count,), generator=generator)
    top = (torch.rand(count, generator=generator) * (height - tall + 1)).floor()
    left = (torch.rand(count, generator=generator) * (width - wide + 1)).floor()
    return Crop(top, left, tall.float(), wide.float(), torch.rand(count, generator=generator) < 0.5)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (20, 33, 24), (60, 41, 16), (8, 8, 16)])
def test_crop_resize_equals_torchvision(generator, height, width, size):
    images = torch.rand(40, 3, height, width, generator=generator)
    crop = random_boxes(generator, 40, height, width)
    result = crop_resize(images, crop, size)
    for i in range(40):
        box = [int(side[i]) for side in (crop.top, crop.left, crop.height, crop.width)]
        expected = TF.resized_crop(images[i], *box, [size, size], antialias=True)
        expected = TF.hflip(expected) if crop.flip[i] else expected
        torch.testing.assert_close(result[i], expected, atol=2e-6, rtol=0)


def test_crop_resize_of_bytes_comes_out_between_0_and_1(generator):
    images = torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8, generator=generator)
    crop = random_boxes(generator, 8, 12, 12)
    torch.testing.assert_close(crop_resize(images, crop, 10), crop_resize(images.float() / 255, crop, 10))


@pytest.mark.parametrize("operation", list(ADJUST))
def test_each_jitter_operation_equals_torchvision(generator, operation):
    images = random_images(generator, 24)
    factors, hue = torch.ones(24, 3), torch.zeros(24)
    amount = torch.rand(24, generator=generator) * 1.6 + 0.2 if operation != HUE else torch.linspace(-0.5, 0.5, 24)
    (hue if operation == HUE else factors[:, operation]).copy_(amount)
    result = color_jitter(images.flatten(2), Jitter(factors, hue, torch.tensor(ORDERS))).view_as(images)
    expected = torch.stack([ADJUST[operation](images[i], float(amount[i])) for i in range(24)])
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=0)


def test_jitter_equals_torchvision_in_every_order(generator):
    images = random_images(generator, 24)
    factors = torch.rand(24, 3, generator=generator) * 1.6 + 0.2
    hue = torch.rand(24, generator=generator) - 0.5
    result = color_jitter(images.flatten(2), Jitter(factors, hue, torch.tensor(ORDERS))).view_as(images)
    for i, order in enumerate(ORDERS):
        expected = images[i]
        for operation in order:
            expected = ADJUST[operation](expected, float(hue[i] if operation == HUE else factors[i, operation]))
        torch.testing.assert_close(result[i], expected, atol=1e-5, rtol=0)


def test_hue_equals_torchvision_where_two_channels_tie():
    levels = torch.tensor([0.0, 0.25, 1.0])
    images = torch.cartesian_prod(levels, levels, levels).T[None]
    for hue in (-0.5, -0.1, 0.0, 1 / 6, 0.37):
        expected = TF.adjust_hue(images[..., None], hue)[..., 0]
        torch.testing.assert_close(shift_hue(images, torch.tensor([hue])), expected, atol=2e-6, rtol=0)


def test_gray_and_normalize_equal_torchvision(generator):
    images, gray = random_images(generator, 6), torch.tensor([True, False] * 3)
    result = gray_and_normalize(images.flatten(2), gray, MEAN, STD).view_as(images)
    for i in range(6):
        expected = TF.rgb_to_grayscale(images[i], 3) if gray[i] else images[i]
        torch.testing.assert_close(result[i], TF.normalize(expected, MEAN, STD), atol=2e-6, rtol=0)
    torch.testing.assert_close(normalize(images, MEAN, STD), TF.normalize(images, MEAN, STD))


def test_blur_equals_torchvision_away_from_the_edge(generator):
    images, sigma = torch.rand(4, 3, 49, 49, generator=generator), torch.tensor([0.1, 0.6, 1.3, 2.0])
    result = gaussian_blur(images, sigma)
    for i in range(4):
        expected = TF.gaussian_blur(images[i], [25, 25], [float(sigma[i])] * 2)
        torch.testing.assert_close(result[i, :, 12:-12, 12:-12], expected[:, 12:-12, 12:-12], atol=1e-6, rtol=0)


def test_blur_keeps_a_constant_image_and_tiny_sigma_any_image(generator):
    images = torch.rand(1, 3, 9, 9, generator=generator)
    assert torch.equal(gaussian_blur(images, torch.tensor([0.01])), images)
    flat = torch.full((1, 3, 9, 9), 0.7)
    torch.testing.assert_close(gaussian_blur(flat, torch.tensor([2.0])), flat)
