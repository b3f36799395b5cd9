"""Which files are images, by their names or, without an ending, by their content; and how Pillow opens them."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageFile

# Pillow opens more, but some of those run a program (EPS) and none is a usual format of data sets.
ENDINGS = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TGA": (".icb", ".tga", ".vda", ".vst"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""By Pillow's name of a format, the endings of its files."""

MAX_PIXELS = 50_000_000
"""Pixels of the largest images that are decoded if nobody asks for larger ones."""


class ImageTooLarge(ValueError):
    """An image of more pixels than allowed; says the limit and what raises it."""


_PLUGIN = "HEIF"  # Pillow has it where pillow-heif is installed
_WITHOUT_MARK = "TGA"  # its files begin with nothing that others do not, so their names decide
_pillow = threading.Lock()
_loose = 0  # how many files are open with looser limits than Pillow's
_own: tuple[int | None, bool] = (None, False)  # Pillow's limits when none is


@functools.cache
def _register() -> None:
    """Make Pillow know its formats, which depend on its version and build, and those of pillow-heif."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def known_endings() -> tuple[str, ...]:
    """List the endings of the names that are taken for images, in small letters, sorted."""
    _register()
    missing = {_PLUGIN} - Image.OPEN.keys()
    return tuple(sorted(ending for name, endings in ENDINGS.items() if name not in missing for ending in endings))


def ending_of(name: str) -> str:
    """Return the ending of a file's name in small letters, with its dot; "" where there is none."""
    ending = os.path.splitext(name)[1].lower()
    return "" if ending == "." else ending


def holds_image(path: str) -> bool:
    """Whether a file without an ending begins as an image does."""
    _register()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats("")):
                return True
    except Image.DecompressionBombError:
        return True  # of a size that is refused, and named, when it is read
    except Exception:  # whatever bytes are no image
        return False


def _formats(ending: str) -> list[str]:
    by_name = ending in ENDINGS[_WITHOUT_MARK]
    return [name for name in ENDINGS if name in Image.OPEN and (by_name or name != _WITHOUT_MARK)]


@contextlib.contextmanager
def opened(path: Path, max_pixels: int = MAX_PIXELS, truncated: bool = False) -> Iterator[Image.Image]:
    """Open an image file; its pixels are decoded where the block asks for them.

    Args:
        path: The file.
        max_pixels: One whose header says more is refused (a 236 kB PNG can decode to 1.3 GB).
        truncated: Decode what there is of a file that was cut short; what is missing becomes gray or black.

    Raises:
        ImageTooLarge: the header says more than `max_pixels`.
        Exception: the header is malformed; Pillow raises many kinds.
    """
    _register()
    with _loosened(max_pixels, truncated), Image.open(path, formats=_formats(ending_of(path.name))) as image:
        if image.width * image.height > max_pixels:
            raise ImageTooLarge(
                f"{image.width} x {image.height} pixels, the limit is {max_pixels / 1e6:g} million "
                "(--data.max_megapixels, predict --max-megapixels)"
            )
        yield image


@contextlib.contextmanager
def _loosened(max_pixels: int, truncated: bool) -> Iterator[None]:
    """Loosen Pillow's own limits, which are those of the whole process, while any thread has such a file open."""
    global _loose, _own
    if max_pixels <= MAX_PIXELS and not truncated:
        yield
        return
    with _pillow:
        if _loose == 0:
            _own = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        _loose += 1
        if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
        ImageFile.LOAD_TRUNCATED_IMAGES |= truncated
    try:
        yield
    finally:
        with _pillow:
            _loose -= 1
            if _loose == 0:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = _own
