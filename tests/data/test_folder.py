"""Folders of image files: what is read, in which order, as which pixels; and what is skipped, by name."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import load_images
from PIL import Image, ImageFile
from torchvision.transforms.v2 import functional

from iic_dist.data.listing import list_images
from iic_dist.errors import UsageError


def picture(height: int = 40, width: int = 40, seed: int = 0) -> np.ndarray:
    """A smooth colour picture, so that JPEG keeps it well."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def load(folder: Path, split: str = "all", unreadable: list | None = None, **options):
    problems = [] if unreadable is None else unreadable
    return load_images(folder, split, unreadable=problems, **{"image_size": 40, **options})


def only_image(folder: Path, **options) -> np.ndarray:
    """The pixels (H, W, C) of a folder's one image."""
    image_set = load(folder, **options)
    assert len(image_set.images) == 1
    return image_set.images[0].permute(1, 2, 0).numpy()


def error_line(folder: object, **options) -> str:
    with pytest.raises(UsageError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which files, in which order


def test_any_nesting_sorted_by_relative_path(tmp_path):
    names = ["b.png", "a/z.PNG", "a/b/c/deep.jpeg", "a-b/x.bmp", "a/b.gif", "Z.webp", "0/10.png", "0/9.png"]
    for i, name in enumerate(names):
        save(tmp_path / name, np.full((40, 40, 3), [10 * i, 0, 200], dtype=np.uint8))
    (tmp_path / "empty" / "folders").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("not an image, and not called one")
    save(tmp_path / ".thumbnails" / "hidden.png", picture())
    (tmp_path / "._b.png").write_text("a Mac's companion file")
    expected = sorted(Path(name) for name in names)
    problems: list = []
    image_set = load(tmp_path, unreadable=problems)
    assert problems == []
    assert image_set.paths == tuple(path.as_posix() for path in expected)
    assert list_images(tmp_path, follow_links=False).paths == [path.as_posix() for path in expected]
    for row, path in enumerate(expected):
        colour = image_set.images[row, :, 20, 20].int() - torch.tensor([10 * names.index(str(path)), 0, 200])
        assert colour.abs().max() <= 4, path  # JPEG, GIF and WebP lose a little
    assert image_set.images.shape == (8, 3, 40, 40)
    assert image_set.images.dtype == torch.uint8
    assert image_set.labels is None
    assert image_set.num_classes == 0


def test_train_is_everything_and_test_is_nothing(tmp_path):
    save(tmp_path / "a.png", picture())
    assert torch.equal(load(tmp_path, "train").images, load(tmp_path, "all").images)
    assert "no split 'test': use one of all, train" in error_line(tmp_path, split="test")


def test_top_level_folders_are_labels_only_if_asked(tmp_path):
    for name in ("dog/1.png", "cat/x/y/2.png", "cat/3.png", "loose.png", "dog/x/4.png"):
        save(tmp_path / name, picture())
    (tmp_path / "only-bad").mkdir()
    (tmp_path / "only-bad" / "x.png").write_bytes(b"")
    assert load(tmp_path).labels is None
    image_set = load(tmp_path, folder_labels=True)
    assert image_set.class_names == ("cat", "dog")
    # cat/3, cat/x/y/2, dog/1, dog/x/4, loose: an image in no folder has no label
    assert image_set.labels.tolist() == [0, 0, 1, 1, -1]
    assert image_set.labels.dtype == torch.int64


def test_labels_without_sub_folders(tmp_path):
    save(tmp_path / "a.png", picture())
    assert "no image in" in error_line(tmp_path, folder_labels=True)


def test_an_empty_or_missing_folder_is_one_line(tmp_path):
    assert f"{str(tmp_path)!r} holds no image file" in error_line(tmp_path)
    (tmp_path / "readme.md").write_text("no image")
    assert "holds no image file" in error_line(tmp_path)
    assert "does not exist" in error_line(tmp_path / "nowhere")
    assert "is not a folder" in error_line(tmp_path / "readme.md")
    assert "names no folder" in error_line("")
    save(tmp_path / "a.png", picture())
    assert "at least 1 pixel, got 0" in error_line(tmp_path, image_size=0)


def test_a_folder_without_a_readable_image_names_the_first(tmp_path):
    for name in ("b.png", "a.jpg"):
        (tmp_path / name).write_text("nonsense")
    line = error_line(tmp_path)
    assert "none of the 2 image files" in line
    assert "'a.jpg': not an image" in line


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "pictures" / "a.png", picture())
    assert len(load("~/pictures").images) == 1


def test_a_size_that_fits_no_memory_is_one_line(tmp_path):
    save(tmp_path / "a.png", picture())
    assert "choose a smaller image size" in error_line(tmp_path, image_size=30_000_000)


# --- which pixels


def test_a_square_image_of_the_wanted_size_is_unchanged(tmp_path):
    save(tmp_path / "a.png", picture())
    assert np.array_equal(only_image(tmp_path), picture())


def test_the_default_size_is_96(tmp_path):
    save(tmp_path / "a.png", picture())
    assert load(tmp_path, image_size=None).images.shape == (1, 3, 96, 96)


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
    assert load(tmp_path).images.shape == (3, 1, 40, 40)
    assert load(tmp_path).images.is_contiguous()
    assert np.array_equal(load(tmp_path).images[0, 0].numpy(), gray)
    colour = np.stack([gray] * 3, axis=-1)
    colour[0, 0] = colour_pixel
    save(tmp_path / "4.png", colour)
    images = load(tmp_path).images
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
    assert load(tmp_path).images.shape == (1, 1, 40, 40)
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


# --- what cannot be read


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, depth: int = 1, colour: int = 0, data: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever its data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def flipped(content: bytes) -> bytes:
    """Bits of the compressed data turned over."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 20]) + content[middle + 20 :]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(60, 60, 3), dtype=np.uint8))
PNG, JPEG, GIF = file_of(NOISE, "PNG"), file_of(NOISE, "JPEG"), file_of(NOISE.quantize(256), "GIF")
TIFF, WEBP, BMP = file_of(NOISE, "TIFF"), file_of(NOISE, "WEBP", lossless=True), file_of(NOISE, "BMP")
MALFORMED = {
    "bmp-short.bmp": BMP[: len(BMP) // 2],
    "bomb-header.png": png_header(100_000, 100_000),
    "bomb-real.png": png_header(20_000, 20_000, data=bytes(2501 * 20_000)),  # one bit a pixel: 50 kB here, 400 Mpx
    "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n",
    "float.tif": file_of(Image.new("F", (40, 40), 0.5), "TIFF"),
    "gif-short.gif": GIF[: len(GIF) // 2],
    "header-only.png": PNG[:33],
    "jpeg-cut.jpg": JPEG[: len(JPEG) // 2],
    "jpeg-start.jpg": JPEG[:4],
    "large.png": png_header(8_000, 8_000, data=bytes(1001 * 8_000)),
    "no-pixels.png": png_header(0, 0),
    "page.jpeg": b"<!doctype html><title>404</title>",
    "png-cut.png": PNG[: len(PNG) // 2],
    "png-flipped.png": flipped(PNG),
    "ppm-short.ppm": b"P6 40 40 255\n" + bytes(100),
    "random.webp": np.random.default_rng(1).bytes(5000),
    "text.png": b"just text",
    "tiff-cut.tif": TIFF[: len(TIFF) // 2],
    "webp-cut.webp": WEBP[: len(WEBP) // 2],
    "zero.png": b"",
}


def test_malformed_files_are_skipped_and_each_is_named_once(tmp_path):
    for name, content in MALFORMED.items():
        (tmp_path / name).write_bytes(content)
    for seed in range(3):
        save(tmp_path / f"good-{seed}.png", picture(seed=seed))
    problems: list = []
    image_set = load(tmp_path, unreadable=problems)
    assert [path for path, _ in problems] == sorted(MALFORMED)
    for path, reason in problems:
        assert reason, path
        assert "\n" not in reason
        assert str(tmp_path) not in reason
    assert [np.array_equal(image_set.images[i].permute(1, 2, 0), picture(seed=i)) for i in range(3)] == [True] * 3
    reasons = dict(problems)
    assert reasons["large.png"] == "ValueError: 8000 x 8000 pixels, the limit is 50000000"
    assert "not an image" in reasons["eps.png"]  # Pillow would start a program for it
    assert "bomb" in reasons["bomb-real.png"].lower()
    assert "not an image" in reasons["text.png"]


def test_the_size_limit_is_checked_before_decoding(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(MALFORMED["large.png"])
    save(tmp_path / "small.png", picture())
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size))
    with pytest.raises(UsageError):
        load(tmp_path, max_pixels=1500)
    assert decoded == []


def test_the_limit_can_be_raised(tmp_path):
    (tmp_path / "large.png").write_bytes(MALFORMED["large.png"])
    problems: list = []
    assert load(tmp_path, unreadable=problems, max_pixels=64_000_000).images.shape == (1, 1, 40, 40)
    assert problems == []


def test_pillows_own_limit_does_not_end_the_load(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    save(tmp_path / "small.png", picture(20, 20))
    save(tmp_path / "warned.png", picture(40, 40))  # 1600: over the limit, a warning of Pillow's
    save(tmp_path / "refused.png", picture(60, 60))  # 3600: over twice the limit, an error
    problems: list = []
    assert len(load(tmp_path, unreadable=problems).images) == 2
    assert [path for path, _ in problems] == ["refused.png"]
    assert len(recwarn) == 0


def test_without_a_list_one_warning_tells_the_number(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"")
    save(tmp_path / "c.png", picture())
    with pytest.warns(UserWarning, match="skipped 2 of 3 image files in .*; the first, 'a.png': not an image"):
        load_images(tmp_path)


def test_a_name_with_any_bytes_is_reported_on_one_line(tmp_path):
    (tmp_path / "line\nbreak.png").write_bytes(b"")
    with open(os.fsencode(tmp_path) + b"/latin-\xe9.png", "wb"):
        pass
    save(tmp_path / "ü.png", picture())
    problems: list = []
    assert len(load(tmp_path, unreadable=problems).images) == 1
    assert [path for path, _ in problems] == ["latin-\\udce9.png", "line\\nbreak.png"]
    "".join(path for path, _ in problems).encode("utf-8")


def test_the_progress_bar_can_be_switched_off(tmp_path, capfd):
    save(tmp_path / "a.png", picture())
    load(tmp_path, progress=False)
    assert capfd.readouterr().err == ""
    load(tmp_path, progress=True)
    assert "decoding images" in capfd.readouterr().err


# --- links and files that are none


@pytest.fixture
def linked(tmp_path) -> Path:
    """root/inside.png and links of every kind; outside/ holds two more images."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    save(root / "inside.png", picture(seed=0))
    save(outside / "one.png", picture(seed=1))
    save(outside / "deep" / "two.png", picture(seed=2))
    (root / "alias.png").symlink_to("inside.png")
    (root / "broken.png").symlink_to("nothing.png")
    (root / "folder").symlink_to(outside)
    (root / "out.png").symlink_to(outside / "one.png")
    (root / "self.png").symlink_to("self.png")
    (root / "up").symlink_to("..")
    (root / "sub").mkdir()
    (root / "sub" / "loop").symlink_to(root)
    return root


def test_links_out_of_the_folder_are_refused(linked):
    problems: list = []
    image_set = load(linked, unreadable=problems)
    assert list_images(linked, follow_links=False).paths == ["alias.png", "inside.png"]
    assert torch.equal(image_set.images[0], image_set.images[1])
    reasons = dict(problems)
    assert len(reasons) == len(problems)
    assert sorted(reasons) == ["broken.png", "folder", "out.png", "self.png", "sub/loop", "up"]
    assert reasons["folder"] == reasons["out.png"] == reasons["up"] == "a symbolic link out of the image folder"
    assert "leads nowhere" in reasons["broken.png"]
    assert "leads nowhere" in reasons["self.png"]
    assert "back to a folder" in reasons["sub/loop"]


def test_links_out_of_the_folder_are_followed_if_asked(linked):
    listing = list_images(linked, follow_links=True)
    paths, refused = listing.paths, listing.refused
    assert paths == ["alias.png", "folder/deep/two.png", "folder/one.png", "inside.png", "out.png"]
    assert sorted(path for path, _ in refused) == ["broken.png", "self.png", "sub/loop", "up"]
    image_set = load(linked, follow_links=True)
    for row, seed in enumerate((0, 2, 1, 0, 1)):
        assert np.array_equal(image_set.images[row].permute(1, 2, 0), picture(seed=seed))


def test_a_folder_given_by_a_link_is_that_folder(tmp_path):
    save(tmp_path / "real" / "a.png", picture())
    (tmp_path / "link").symlink_to("real")
    assert len(load(tmp_path / "link").images) == 1


def test_folders_that_link_to_each_other_end(tmp_path):
    for i in range(8):
        save(tmp_path / f"{i}" / "x.png", picture())
        for j in range(8):
            (tmp_path / f"{i}" / f"to-{j}").symlink_to(tmp_path / f"{j}")
    listing = list_images(tmp_path, follow_links=True)
    paths, refused = listing.paths, listing.refused
    assert len(paths) == 8 + 8 * 7  # each folder, and each through each other one
    assert all(len(path.split("/")) <= 3 for path in paths)
    assert len(refused) == 8 + 8 * 7 * 8


def test_a_named_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    save(tmp_path / "a.png", picture())
    problems: list = []
    assert len(load(tmp_path, unreadable=problems).images) == 1
    assert problems == [("pipe.png", "not a regular file")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_and_a_folder_without_permission_are_named(tmp_path):
    save(tmp_path / "a.png", picture())
    save(tmp_path / "closed" / "b.png", picture())
    save(tmp_path / "closed.png", picture()).chmod(0)
    (tmp_path / "closed").chmod(0)
    problems: list = []
    try:
        assert len(load(tmp_path, unreadable=problems).images) == 1
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert problems == [("closed", "Permission denied"), ("closed.png", "Permission denied")]
