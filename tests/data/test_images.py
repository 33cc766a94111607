from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfsup_xbn.data import images, load_data
from selfsup_xbn.data.files import broken_files
from selfsup_xbn.data.images import read_image
from selfsup_xbn.errors import UserError

RAMP = np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)
COLOR = np.stack([RAMP, RAMP[::-1], 255 - RAMP], 2)


def saved(folder, array, name="image.png", **options) -> str:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(folder / name, **options)
    return str(folder / name)


def test_color_is_kept_and_gray_fills_three_channels(tmp_path):
    assert np.array_equal(read_image(saved(tmp_path, COLOR)), COLOR)
    assert np.array_equal(read_image(saved(tmp_path, RAMP)), np.stack([RAMP] * 3, 2))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path, name):
    path = saved(tmp_path, RAMP.astype(np.uint16) * 257, name)
    assert np.array_equal(read_image(path), np.stack([RAMP] * 3, 2))


def test_bilevel_and_palette_images_show_their_colors(tmp_path):
    bits = RAMP > 100
    assert np.array_equal(np.asarray(read_image(saved(tmp_path, bits)))[..., 0], bits * 255)
    palette = Image.fromarray(COLOR).quantize(48)
    assert np.array_equal(read_image(saved(tmp_path, palette)), palette.convert("RGB"))


def test_transparent_pixels_show_a_white_ground(tmp_path):
    alpha = np.full((6, 8, 1), 255, np.uint8)
    alpha[0], alpha[1] = 0, 51
    expected = COLOR.astype(float)
    expected[0] = 255
    expected[1] = 0.2 * COLOR[1] + 0.8 * 255
    result = np.asarray(read_image(saved(tmp_path, np.concatenate([COLOR, alpha], 2)))).astype(float)
    assert np.abs(result - expected).max() <= 1


def test_transparent_palette_color_shows_a_white_ground(tmp_path):
    palette = Image.fromarray((RAMP > 100).astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    result = np.asarray(read_image(saved(tmp_path, palette, transparency=0)))
    assert np.array_equal(result, np.where((RAMP > 100)[..., None], [40, 50, 60], 255))


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = np.asarray(read_image(saved(tmp_path, cmyk, "ink.jpg", quality=100))).astype(int)
    assert np.abs(red - [255, 0, 0]).max() < 6


def test_exif_orientation_is_honored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate a quarter clockwise to see it upright
    path = saved(tmp_path, COLOR, exif=exif)
    assert np.array_equal(read_image(path), np.rot90(COLOR, -1))


def test_box_is_cut_out_and_clipped_to_the_image(tmp_path):
    path = saved(tmp_path, COLOR)
    assert np.array_equal(read_image(path, (2, 1, 5, 4)), COLOR[1:4, 2:5])
    assert np.array_equal(read_image(path, (-3, 4, 99, 99)), COLOR[4:])
    with pytest.raises(UserError, match=r"overlaps the 8 x 6 image, got \(8, 0, 9, 3\)"):
        read_image(path, (8, 0, 9, 3))


def test_files_that_cannot_be_read_are_named(tmp_path):
    whole = saved(tmp_path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    (tmp_path / "cut.png").write_bytes(Path(whole).read_bytes()[:2000])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name in ("cut.png", "text.png", "empty.png", "missing.png"):
        with pytest.raises(UserError, match=name) as fault:
            read_image(str(tmp_path / name))
        assert "\n" not in str(fault.value)


def test_images_with_too_many_pixels_are_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, COLOR)
    monkeypatch.setattr(images, "MAX_PIXELS", 47)
    with pytest.raises(UserError, match=r"image.png: expected at most 47 pixels, got 8 x 6"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"image.png: the image is too large"):
        read_image(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_broken_files_of_a_data_set_are_found(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("selfsup_xbn.data.workers.CHUNK", 4)
    root, sizes = tmp_path, iter(range(20, 100))
    for name in ("train/a", "train/b", "test/c"):
        (root / name).mkdir(parents=True)
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 255, (next(sizes), 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    assert broken_files(load_data(f"folder:{root}", workers=0), workers) == {}
    broken = [root / name for name in ("train/b/1.png", "train/b/4.png", "test/c/0.png")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:1000])
    messages = broken_files(load_data(f"folder:{root}", workers=0), workers)
    assert list(messages) == [str(path) for path in broken]
    assert all("the image cannot be decoded" in message for message in messages.values())
