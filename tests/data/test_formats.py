"""Which files are images, by their endings or their content; files that are too large, or were cut short."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_folders import error_line, load_small, only_image, picture, save
from PIL import Image, ImageFile

from iic_dist.data import formats
from iic_dist.data.decode import decode_image, reason_for
from iic_dist.data.listing import left_out_line, list_images


def content(kind: str, seed: int = 0, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed=seed)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("ending", ["tga", "TGA", "vda", "j2k", "j2c", "jpc", "jpf", "jp2", "apng"])
def test_formats_that_pillow_knows_are_read(ending: str, tmp_path: Path) -> None:
    """Codestreams of JPEG 2000 and TGA vanished without a word."""
    small = ending.lower()
    kind = {"tga": "TGA", "vda": "TGA", "apng": "PNG"}.get(small, "JPEG2000")
    codestream = {"no_jp2": True} if small in ("j2k", "j2c", "jpc") else {}
    (tmp_path / f"x.{ending}").write_bytes(content(kind, **codestream))
    assert np.array_equal(only_image(tmp_path), picture())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "PPM"])
def test_a_name_without_an_ending_is_judged_by_its_content(kind: str, tmp_path: Path) -> None:
    """Files named by their digests alone vanished."""
    (tmp_path / "d41d8cd98f").write_bytes(content(kind))
    (tmp_path / "README").write_text("Python is a language, P5 and BM two marks\n")
    (tmp_path / "blob").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "targa").write_bytes(content("TGA"))  # begins with nothing that others do not
    (tmp_path / "empty").write_bytes(b"")
    listing = list_images(tmp_path, follow_links=False)
    assert (listing.paths, listing.refused, listing.left_out) == (["d41d8cd98f"], [], {"": 4})
    assert np.abs(only_image(tmp_path).astype(int) - picture()).mean() < 10


def test_only_files_are_looked_into(tmp_path: Path) -> None:
    save(tmp_path / "outside.png", picture())
    root = tmp_path / "root"
    save(root / "a.png", picture())
    (root / "link").symlink_to(tmp_path / "outside.png")
    (root / "broken").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / "pipe")  # opening it would wait for ever
    listing = list_images(root, follow_links=False)
    assert (listing.paths, listing.refused, listing.left_out) == (["a.png"], [], {"": 3})
    assert list_images(root, follow_links=True).paths == ["a.png", "link"]


def test_a_huge_image_without_an_ending_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "huge").write_bytes(content("PNG"))
    assert list_images(tmp_path, follow_links=False).paths == ["huge"]


def test_what_is_left_out_is_counted_by_ending(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["1.DNG", "2.dng", "3.jxl", "4.heic", "notes", "t.txt", "deep/u.txt", "deep/v.TXT", ".no.txt", "._no.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"something")
    line = error_line(tmp_path)
    said = "8 files left out: 3 .txt, 2 .dng, 1 without an ending, 1 .heic, 1 .jxl"
    assert line.endswith(f"; {said}; pip install pillow-heif makes .heic readable")
    save(tmp_path / "a.png", picture())
    with caplog.at_level("INFO"):
        load_small(tmp_path)
    assert caplog.text.count(said) == 1
    many = {f".{letter}": 10 - place for place, letter in enumerate("abcdefgh")}
    assert left_out_line(many).endswith("5 .f, 7 of 2 other endings")
    assert left_out_line({".\x1b\udce9": 1}) == "1 file left out: 1 .\\x1b\\xe9"


def test_the_kept_listing_counts_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "root"
    save(root / "a.png", picture())
    (root / "b.txt").write_text("text")
    for _ in range(2):
        load_small(root, cache=tmp_path / "cache", relist=True)
    with caplog.at_level("INFO"):
        load_small(root, cache=tmp_path / "cache", relist=False)
    assert "1 file left out: 1 .txt" in caplog.text


class _HeifFile(ImageFile.ImageFile):
    """Stands for pillow-heif: its images are TIFF behind a mark."""

    format = "HEIF"

    def _open(self) -> None:
        with Image.open(io.BytesIO(self.fp.read()[12:]), formats=["TIFF"]) as image:
            image.load()
            self._inner = image.copy()
        self._mode, self._size = self._inner.mode, self._inner.size
        self.tile = []

    def load(self) -> object:
        self.im = self._inner.im
        return super().load()


@pytest.fixture
def heif() -> Iterator[None]:
    """Pillow as it is where pillow-heif is installed."""
    formats.known_endings()
    before = Image.OPEN.copy(), Image.ID.copy()
    Image.register_open("HEIF", _HeifFile, lambda prefix: prefix[4:12] == b"ftypheic")
    yield
    Image.OPEN.clear()
    Image.OPEN.update(before[0])
    Image.ID[:] = before[1]


def heic() -> bytes:
    return b"\0\0\0\x18ftypheic" + content("TIFF")


@pytest.mark.skipif("HEIF" in formats.Image.OPEN, reason="pillow-heif is installed")
def test_heic_is_read_where_pillow_can(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Photographs of phones vanished without a word; a listing that was kept without them is not taken."""
    root = tmp_path / "root"
    save(root / "a.png", picture(seed=1))
    (root / "b.HEIC").write_bytes(heic())
    (root / "c").write_bytes(heic())
    assert load_small(root, cache=tmp_path / "cache").paths == ("a.png",)
    assert list_images(root, follow_links=False).left_out == {".heic": 1, "": 1}
    request.getfixturevalue("heif")
    loaded = load_small(root, cache=tmp_path / "cache", relist=False)
    assert loaded.paths == ("a.png", "b.HEIC", "c")
    for row in (1, 2):
        assert np.array_equal(loaded.images[row].permute(1, 2, 0), picture())


def test_an_image_above_the_limit_says_what_raises_it(tmp_path: Path) -> None:
    """Photographs above 50 million pixels were passed over, and no option took them."""
    path = save(tmp_path / "x.png", picture(20, 30))
    with pytest.raises(formats.ImageTooLarge) as caught:
        decode_image(path, 8, 599)
    assert reason_for(caught.value).startswith("30 x 20 pixels, the limit is 0.000599 million (--data.max_megapixels")
    assert decode_image(path, 8, 600).shape == (3, 8, 8)


def test_a_raised_limit_counts_more_than_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 179 million pixels Pillow itself refuses."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(formats, "MAX_PIXELS", 150)
    path = save(tmp_path / "x.png", picture(20, 30))
    with pytest.raises(Image.DecompressionBombError):
        decode_image(path, 8, 150)
    assert decode_image(path, 8, 600).shape == (3, 8, 8)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(("kind", "short"), [("JPEG", 1), ("JPEG", 100), ("PNG", 300), ("TIFF", 2000), ("BMP", 9)])
def test_a_file_that_was_cut_short_is_taken_if_asked(kind: str, short: int, tmp_path: Path) -> None:
    """A JPEG whose last byte was missing was passed over, and no option took it."""
    (tmp_path / f"cut.{kind.lower()}").write_bytes(content(kind)[:-short])
    save(tmp_path / "whole.png", picture(seed=1))
    problems: list[tuple[str, str]] = []
    assert load_small(tmp_path, unreadable=problems).paths == ("whole.png",)
    [(_, reason)] = problems
    assert "short" in reason or "truncated" in reason or "broken" in reason
    taken = load_small(tmp_path, truncated=True)
    assert len(taken.paths) == 2
    there = slice(30, 40) if kind == "BMP" else slice(0, 10)  # BMP is written from below
    difference = taken.images[0, :, there].permute(1, 2, 0).int().numpy() - picture()[there]
    assert np.abs(difference).mean() < 10
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_pillows_limits_are_put_back_when_the_last_thread_is_done(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(content("JPEG")[:-1])
    own = Image.MAX_IMAGE_PIXELS

    def read(number: int) -> bool:
        return bool(decode_image(tmp_path / "cut.jpg", 8, 10**9 + number, truncated=True).any())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))
    assert own == Image.MAX_IMAGE_PIXELS
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
