"""Images from a folder of files; a file that cannot be read is named and skipped, never fatal."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from iic_dist.data.image_set import ImageSet
from iic_dist.errors import UsageError

# fmt: off
SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
)
# fmt: on
# Pillow opens more, but some of those run a program (EPS) and none is a usual format of data sets.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 50_000_000

Unreadable = list[tuple[str, str]]


def load_folder(
    folder: Path,
    *,
    image_size: int = 96,
    labels: bool = False,
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
    unreadable: Unreadable | None = None,
) -> ImageSet:
    """Load every image under `folder`, in any nesting, in the order of the relative paths.

    Each becomes RGB (see `decode_image`); if no pixel of any of them has a colour, the set has one channel.
    Hidden files and folders, and files whose names do not end as images do, are passed over.

    Args:
        folder: Where to look; ~ is expanded.
        image_size: S, side of the loaded images in pixels.
        labels: Take the top-level sub-folders as classes; an image in none of them gets the label -1.
        follow_links: Also read symbolic links that lead out of the folder.
        max_pixels: A file whose header says more is not decoded (a 236 kB PNG can decode to 1.3 GB).
        progress: Show a progress bar; off for all ranks but one.
        unreadable: Gets (relative path, reason) for each file that was skipped, in order of the paths.
            Without it one warning tells their number.

    Raises:
        UsageError: no such folder, no image file in it, none that can be read, or labels without sub-folders.
    """
    root = folder.expanduser()
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UsageError(f"the image folder {str(folder)!r} {problem}")
    paths, problems = list_images(root, follow_links)
    if not paths and not problems:
        raise UsageError(
            f"the image folder {str(folder)!r} holds no image file (names that end in {' '.join(SUFFIXES)})"
        )
    if labels:
        _class_names(paths, folder)  # an error now rather than after the decoding
    images, kept, malformed = _decode_all(root, paths, image_size, max_pixels, progress)
    problems = [(printable(path), reason) for path, reason in sorted(problems + malformed)]
    if unreadable is not None:
        unreadable.extend(problems)
    if not kept:
        raise UsageError(
            f"none of the {len(problems)} image files in {str(folder)!r} can be read; "
            f"the first, {problems[0][0]!r}: {problems[0][1]}"
        )
    if problems and unreadable is None:
        warnings.warn(
            f"skipped {len(problems)} of {len(problems) + len(kept)} image files in {str(folder)!r}; "
            f"the first, {problems[0][0]!r}: {problems[0][1]}",
            stacklevel=2,
        )
    name = f"folder:{folder}"
    if not labels:
        return ImageSet(name, images, None, (), tuple(kept))
    classes = _class_names(kept, folder)
    number = {class_name: i for i, class_name in enumerate(classes)}
    targets = [number[path.split("/")[0]] if "/" in path else -1 for path in kept]
    return ImageSet(name, images, torch.tensor(targets), tuple(map(printable, classes)), tuple(kept))


def _class_names(paths: list[str], folder: Path) -> list[str]:
    """List the top-level sub-folders that hold an image."""
    classes = sorted({path.split("/")[0] for path in paths if "/" in path})
    if not classes:
        raise UsageError(f"folder labels asked for, but no image in {str(folder)!r} lies in a sub-folder")
    return classes


def list_images(root: Path, follow_links: bool) -> tuple[list[str], Unreadable]:
    """Find the image files under `root` by name, without opening them.

    Returns:
        The relative paths, "/" between their parts, sorted part by part; and what is refused, with reasons.
    """
    found: list[str] = []
    refused: Unreadable = []
    base = os.path.realpath(root)
    pending = [("", False)]  # a folder, and whether a link led to it
    while pending:
        folder, linked = pending.pop()
        try:
            with os.scandir(root / folder) as scan:
                entries = [entry for entry in scan if not entry.name.startswith(".")]
        except OSError as error:
            refused.append((folder or ".", reason_for(error)))
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            is_link = entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
            if not is_folder and not entry.name.lower().endswith(SUFFIXES):
                continue
            reason = _link_problem(entry.path, base, follow_links, linked) if is_link else None
            if reason is None and not is_folder and not entry.is_file():
                reason = "not a regular file"  # opening a named pipe would wait for ever
            if reason is not None:
                refused.append((path, reason))
            elif is_folder:
                pending.append((path, linked or is_link))
            else:
                found.append(path)
    return sorted(found, key=lambda path: path.split("/")), refused


def _link_problem(link: str, base: str, follow_links: bool, linked: bool) -> str | None:
    """Say why a symbolic link must not be followed, or None."""
    try:
        target = os.path.realpath(link, strict=True)
    except OSError as error:
        return f"a symbolic link that leads nowhere ({error.strerror})"
    if not follow_links and os.path.commonpath([base, target]) != base:
        return "a symbolic link out of the image folder"
    if os.path.isdir(target):
        parent = os.path.realpath(os.path.dirname(link))
        if os.path.commonpath([parent, target]) == target:
            return "a symbolic link back to a folder that it lies in"
        if linked:  # n folders that link to each other hold n! paths
            return "a symbolic link to a folder, inside a linked folder"
    return None


def _decode_all(
    root: Path, paths: list[str], image_size: int, max_pixels: int, progress: bool
) -> tuple[Tensor, list[str], Unreadable]:
    """Decode what can be decoded: (M, C, S, S), its paths, and what cannot with the reason."""
    shape = (len(paths), 3, image_size, image_size)
    try:
        images = torch.empty(shape, dtype=torch.uint8)
    except RuntimeError as error:
        raise UsageError(
            f"{len(paths)} images of {image_size} x {image_size} pixels need {math.prod(shape) / 1e9:.1f} GB "
            "of memory, more than there is: choose a smaller image size"
        ) from error
    kept: list[str] = []
    malformed: Unreadable = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities that it reads, and of sizes that we refuse
        for path in tqdm(paths, desc="decoding images", unit="image", disable=not progress):
            try:
                images[len(kept)] = decode_image(root / path, image_size, max_pixels)
            except Exception as error:  # a malformed file can raise nearly anything
                malformed.append((path, reason_for(error)))
            else:
                kept.append(path)
    images = images[: len(kept)]
    gray = images[:, 0]
    if torch.equal(gray, images[:, 1]) and torch.equal(gray, images[:, 2]):
        images = images[:, :1].contiguous()
    return images, kept, malformed


def decode_image(path: Path, image_size: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one file: turned as its EXIF says, its central square resized with antialias (triangle filter).

    Transparent pixels lie on white. 16-bit gray is scaled from its whole range, 0-65535. Of an animation the
    first picture counts.

    Returns:
        (3, S, S) uint8 RGB.

    Raises:
        Exception: the file is malformed; Pillow raises many kinds.
    """
    Image.init()  # registers the formats; which ones there are depends on Pillow's version and build
    with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, the limit is {max_pixels}")
        image.load()
        with contextlib.suppress(Exception):  # a damaged EXIF block does not make the pixels bad
            ImageOps.exif_transpose(image, in_place=True)
        return square(image, image_size)


def header_size(path: Path) -> tuple[int, int]:
    """Read width and height of an image file in pixels, without decoding it, before it is turned as its EXIF says.

    Raises:
        Exception: the header is malformed.
    """
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            return image.size


def square(image: Image.Image, image_size: int) -> Tensor:
    """Resize the central square of a picture: (3, S, S) uint8 RGB. See `decode_image`; the EXIF is not looked at."""
    # Square first: a strip of 20000 x 1 resized by its shorter side would be 20000 squares long.
    fitted = ImageOps.fit(_to_rgb(image), (image_size, image_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts everything above 255 off
        wide = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def reason_for(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or its header is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(" ".join(f"{type(error).__name__}: {error}".split())[:200])


def printable(text: str) -> str:
    """Escape what would break a line or an encoding; a file name may hold any byte but "/" and NUL."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
