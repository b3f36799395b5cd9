"""Which pixels an image file becomes, whatever its format, size and orientation."""

from __future__ import annotations

import numpy as np
import pytest
from image_folders import load_small, only_image, picture, save
from PIL import Image
from torchvision.transforms.v2 import functional


def test_a_square_image_of_the_wanted_size_is_unchanged(tmp_path):
    save(tmp_path / "a.png", picture())
    assert np.array_equal(only_image(tmp_path), picture())


def test_the_default_size_is_96(tmp_path):
    save(tmp_path / "a.png", picture())
    assert load_small(tmp_path, image_size=None).images.shape == (1, 3, 96, 96)


@pytest.mark.parametrize(("height", "width"), [(120, 120), (80, 160), (200, 80), (20, 20), (80, 88)])
def test_shorter_side_then_centre_crop_as_torchvision(tmp_path, height, width):
    pixels = np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    save(tmp_path / "a.png", pixels)
    resized = functional.resize(Image.fromarray(pixels), [40])  # here its sizes and crops are whole pixels
    expected = np.asarray(functional.center_crop(resized, [40, 40])).astype(int)
    assert np.abs(only_image(tmp_path).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(80, 86), (97, 133), (181, 47)])
def test_the_central_square_of_any_size(tmp_path, height, width):
    pixels = np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    save(tmp_path / "a.png", pixels)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    expected = np.asarray(functional.resize(Image.fromarray(square), [40])).astype(int)
    inside = (slice(2, -2), slice(2, -2))  # at the border ours sees the pixels beyond it
    assert np.abs(only_image(tmp_path)[inside].astype(int) - expected[inside]).max() <= 1


def test_a_strip_does_not_blow_up(tmp_path):
    strip = np.zeros((1, 20000, 3), dtype=np.uint8)
    strip[:, 9000:11000] = 77
    save(tmp_path / "a.png", strip)
    assert (only_image(tmp_path) == 77).all()


@pytest.mark.parametrize("colour_pixel", [(9, 8, 8), (8, 9, 8), (8, 8, 9)])
def test_all_gray_files_stay_one_channel_and_one_colour_pixel_makes_three(tmp_path, colour_pixel):
    gray = picture()[..., 0]
    save(tmp_path / "1.png", gray)
    save(tmp_path / "2.png", np.stack([gray] * 3, axis=-1))  # gray pixels in an RGB file
    Image.fromarray(gray).convert("1").save(tmp_path / "3.png")
    assert load_small(tmp_path).images.shape == (3, 1, 40, 40)
    assert load_small(tmp_path).images.is_contiguous()
    assert np.array_equal(load_small(tmp_path).images[0, 0].numpy(), gray)
    colour = np.stack([gray] * 3, axis=-1)
    colour[0, 0] = colour_pixel
    save(tmp_path / "4.png", colour)
    images = load_small(tmp_path).images
    assert images.shape == (4, 3, 40, 40)
    assert np.array_equal(images[0].numpy(), np.stack([gray] * 3))


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(picture()).quantize(16)
    expected = np.asarray(image.convert("RGB")).copy()
    image.save(tmp_path / "a.png")
    assert np.array_equal(only_image(tmp_path), expected)
    image.save(tmp_path / "a.png", transparency=3)
    expected[np.asarray(image) == 3] = 255
    assert np.array_equal(only_image(tmp_path), expected)


def test_transparent_pixels_lie_on_white(tmp_path):
    rgba = np.concatenate([picture(), np.full((40, 40, 1), 255, dtype=np.uint8)], axis=-1)
    rgba[:20, :, 3] = 0
    rgba[20:30] = [0, 100, 200, 51]  # one fifth opaque
    save(tmp_path / "a.png", rgba)
    pixels = only_image(tmp_path)
    assert (pixels[:20] == 255).all()
    assert np.abs(pixels[20:30].astype(int) - [204, 224, 244]).max() <= 1
    assert np.array_equal(pixels[30:], picture()[30:])


def test_gray_with_alpha_is_gray(tmp_path):
    Image.new("LA", (40, 40), (100, 255)).save(tmp_path / "a.png")
    assert load_small(tmp_path).images.shape == (1, 1, 40, 40)
    assert (only_image(tmp_path) == 100).all()


@pytest.mark.parametrize("ending", ["tif", "jpg"])
def test_cmyk(tmp_path, ending):
    Image.new("CMYK", (40, 40), (255, 0, 51, 0)).save(tmp_path / f"a.{ending}")  # no red, all green, 4/5 blue
    assert np.abs(only_image(tmp_path).astype(int) - [0, 255, 204]).max() <= 3


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_gray_is_scaled_and_not_cut_off(tmp_path, ending):
    wide = np.linspace(0, 65535, 1600).round().astype(np.uint16).reshape(40, 40)
    save(tmp_path / f"a.{ending}", wide)
    pixels = only_image(tmp_path)
    assert pixels.shape == (40, 40, 1)
    assert np.abs(pixels[..., 0] - wide / 257).max() <= 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_exif_orientation(tmp_path, orientation, ending):
    upright = picture()
    # What the file holds if a viewer must turn it: the meaning of the values in the EXIF standard.
    held = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / f"a.{ending}", np.ascontiguousarray(held), exif=exif)
    assert np.array_equal(only_image(tmp_path), upright)


def test_a_wide_photo_turned_by_exif_is_cropped_after_the_turn(tmp_path):
    upright = picture(height=120, width=40)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", np.ascontiguousarray(np.rot90(upright, 1)), exif=exif)
    assert np.array_equal(only_image(tmp_path), upright[40:80])


def test_a_damaged_exif_block_keeps_its_pixels(tmp_path):
    save(tmp_path / "a.png", picture(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(40)))
    assert np.array_equal(only_image(tmp_path), picture())


def test_the_first_picture_of_an_animation(tmp_path):
    frames = [Image.fromarray(picture(seed=seed)).quantize(64) for seed in range(3)]
    expected = np.asarray(frames[0].convert("RGB"))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    assert np.abs(only_image(tmp_path).astype(int) - expected).max() <= 1
