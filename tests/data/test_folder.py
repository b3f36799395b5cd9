"""Folders of image files: what is read, in which order; and what is skipped, by name."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import error_line, load_images, load_small, picture, save
from PIL import Image, ImageFile

from iic_dist.data.listing import list_images
from iic_dist.errors import UsageError


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
    image_set = load_small(tmp_path, unreadable=problems)
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
    assert torch.equal(load_small(tmp_path, "train").images, load_small(tmp_path, "all").images)
    assert "no split 'test': use one of all, train" in error_line(tmp_path, split="test")


def test_top_level_folders_are_labels_only_if_asked(tmp_path):
    for name in ("dog/1.png", "cat/x/y/2.png", "cat/3.png", "loose.png", "dog/x/4.png"):
        save(tmp_path / name, picture())
    (tmp_path / "only-bad").mkdir()
    (tmp_path / "only-bad" / "x.png").write_bytes(b"")
    assert load_small(tmp_path).labels is None
    image_set = load_small(tmp_path, folder_labels=True)
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
    assert "holds 2 image files, and none can be read" in line
    assert "'a.jpg': not an image" in line


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "pictures" / "a.png", picture())
    assert len(load_small("~/pictures").images) == 1


def test_a_size_that_fits_no_memory_is_one_line(tmp_path):
    save(tmp_path / "a.png", picture())
    assert "choose a smaller image size" in error_line(tmp_path, image_size=30_000_000)


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
    image_set = load_small(tmp_path, unreadable=problems)
    assert [path for path, _ in problems] == sorted(MALFORMED)
    for path, reason in problems:
        assert reason, path
        assert "\n" not in reason
        assert str(tmp_path) not in reason
    assert [np.array_equal(image_set.images[i].permute(1, 2, 0), picture(seed=i)) for i in range(3)] == [True] * 3
    reasons = dict(problems)
    assert reasons["large.png"] == (
        "8000 x 8000 pixels, the limit is 50 million (--data.max_megapixels, predict --max-megapixels)"
    )
    assert "not an image" in reasons["eps.png"]  # Pillow would start a program for it
    assert "bomb" in reasons["bomb-real.png"].lower()
    assert "not an image" in reasons["text.png"]


def test_the_size_limit_is_checked_before_decoding(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(MALFORMED["large.png"])
    save(tmp_path / "small.png", picture())
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size))
    with pytest.raises(UsageError):
        load_small(tmp_path, max_pixels=1500)
    assert decoded == []


def test_the_limit_can_be_raised(tmp_path):
    (tmp_path / "large.png").write_bytes(MALFORMED["large.png"])
    problems: list = []
    assert load_small(tmp_path, unreadable=problems, max_pixels=64_000_000).images.shape == (1, 1, 40, 40)
    assert problems == []


def test_pillows_own_limit_does_not_end_the_load(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    save(tmp_path / "small.png", picture(20, 20))
    save(tmp_path / "warned.png", picture(40, 40))  # 1600: over the limit, a warning of Pillow's
    save(tmp_path / "refused.png", picture(60, 60))  # 3600: over twice the limit, an error
    problems: list = []
    assert len(load_small(tmp_path, unreadable=problems).images) == 2
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
    assert len(load_small(tmp_path, unreadable=problems).images) == 1
    assert [path for path, _ in problems] == ["latin-\\xe9.png", "line\\nbreak.png"]
    "".join(path for path, _ in problems).encode("utf-8")


def test_the_progress_bar_can_be_switched_off(tmp_path, capfd):
    save(tmp_path / "a.png", picture())
    load_small(tmp_path, progress=False)
    assert capfd.readouterr().err == ""
    load_small(tmp_path, progress=True)
    assert "decoding images" in capfd.readouterr().err
