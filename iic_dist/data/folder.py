"""A folder of image files as a set of images, decoded once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from iic_dist.data import cache as decoded_cache
from iic_dist.data.decode import DECODER, Resampling, decoded_files
from iic_dist.data.formats import MAX_PIXELS, known_endings
from iic_dist.data.image_set import ImageSet
from iic_dist.data.listing import Listing, Unreadable, left_out_line, list_or_recall
from iic_dist.errors import UsageError
from iic_dist.wording import counted, printable

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How a folder is read: with what means, and which of its files are left out.

    Attributes:
        max_pixels: A file whose header says more is not decoded.
        cache: Folder where the decoded images are kept for other runs and processes; they are decoded again when a
            file comes, goes or changes its size or time of change. None: a temporary file, for this process.
        workers: Processes that decode. 0: this one does. None: one a core, at most 16.
        relist: Look for files that came, went or changed. False: trust the listing that `cache` keeps, if it does.
        verify: Compare the checksums of decoded images that are there; one process of a machine is enough.
        progress: Show a progress bar; off for all ranks but one.
        follow_links: Also read symbolic links that lead out of the folder.
        resampling: How the images are resized.
        truncated: Also take files that were cut short; see `iic_dist.data.formats.opened`.
    """

    max_pixels: int = MAX_PIXELS
    cache: Path | None = None
    workers: int | None = 0
    relist: bool = True
    verify: bool = True
    progress: bool = True
    follow_links: bool = False
    resampling: Resampling = "bilinear"
    truncated: bool = False


def load_folder(
    folder: Path,
    reading: Reading | None = None,
    *,
    image_size: int = 96,
    labels: bool = False,
    unreadable: Unreadable | None = None,
) -> ImageSet:
    """Load every image under `folder`, in any nesting, in the order of the relative paths.

    Each becomes RGB (see `decode_image`); if no pixel of any of them has a colour, the set has one channel.
    Hidden files and folders are passed over; files whose names do not end as images do are counted, but for those
    without an ending that hold one. The images are mapped from a file on the disk (see `iic_dist.data.cache`), so
    that a set may be larger than the memory.

    Args:
        folder: Where to look; ~ is expanded.
        reading: How; None for the defaults.
        image_size: S, side of the loaded images in pixels.
        labels: Take the top-level sub-folders as classes; an image in none of them gets the label -1.
        unreadable: Gets (relative path, reason) for each file that was skipped, in order of the paths.
            Without it one warning tells their number.

    Raises:
        UsageError: no such folder, no image file in it, none that can be read, labels without sub-folders, no room
            for the decoded images, or a decoding process that ended.
    """
    reading = reading or Reading()
    root = folder.expanduser()
    kept = None if reading.cache is None else kept_under(reading.cache, root)
    listing = find_images(folder, reading.follow_links, kept, reading.relist)
    if reading.verify and listing.left_out:  # one process of a machine says it
        _log.info("%s: %s", folder, left_out_line(listing.left_out))
    if labels:
        class_names_of(listing.paths, folder)  # an error now rather than after the decoding

    other = [] if reading.resampling == "bilinear" else [str(reading.resampling)]  # what was kept before stays good
    other += ["truncated"] if reading.truncated else []
    source = json.dumps([listing.digest, image_size, reading.max_pixels, DECODER, *other])

    def decode_into(file: BinaryIO) -> None:
        _check_room(file, len(listing.paths), image_size)
        with decoded_files(
            root,
            listing.paths,
            image_size,
            reading.max_pixels,
            reading.workers,
            reading.progress,
            reading.resampling,
            reading.truncated,
        ) as chunks:
            decoded_cache.write(file, source, image_size, chunks)

    path = None if kept is None else Path("-".join((kept, f"{image_size}px", *other)) + ".images")
    images, contents = decoded_cache.read_or_build(
        path, source, decode_into, verify=reading.verify, progress=reading.progress
    )
    problems = passed_over(folder, contents.paths, listing.refused + contents.malformed)
    if unreadable is not None:
        unreadable.extend(problems)
    if problems and unreadable is None:
        warnings.warn(
            f"skipped {len(problems)} of {counted(len(problems) + len(images), 'image file')} in {str(folder)!r}; "
            f"the first, {problems[0][0]!r}: {problems[0][1]}",
            stacklevel=2,
        )
    classes = class_names_of(contents.paths, folder) if labels else []
    return ImageSet(
        f"folder:{folder}",
        images,
        labels_of(contents.paths, classes) if labels else None,
        tuple(map(printable, classes)),
        tuple(contents.paths),
        contents.checksum,
    )


def find_images(folder: Path, follow_links: bool, kept: str | None, relist: bool) -> Listing:
    """List the image files under a folder.

    Args:
        folder: Where to look; ~ is expanded.
        follow_links, relist: As of `load_folder`.
        kept: What the file's name starts with in which the listing is kept; None: it is not.

    Raises:
        UsageError: there is no such folder, or no image file in it.
    """
    root = folder.expanduser()
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UsageError(f"the image folder {str(folder)!r} {problem}")
    listing = list_or_recall(root, follow_links, None if kept is None else Path(f"{kept}.listing"), relist)
    check_listing(listing, folder)
    return listing


def check_listing(listing: Listing, folder: Path) -> None:
    """Raise a UsageError where a folder holds no image file."""
    if not listing.paths and not listing.refused:
        endings = " ".join(known_endings())
        more = f"; {left_out_line(listing.left_out)}" if listing.left_out else ""
        raise UsageError(f"the image folder {str(folder)!r} holds no image file (names that end in {endings}){more}")


def passed_over(folder: Path, paths: list[str], unreadable: Unreadable) -> Unreadable:
    """Return what could not be read of a folder in the order of the paths, fit to be printed.

    Raises:
        UsageError: nothing else is there.
    """
    problems = [(printable(path), reason) for path, reason in sorted(unreadable)]
    if not paths:
        raise UsageError(
            f"{str(folder)!r} holds {counted(len(problems), 'image file')}, and none can be read; "
            f"the first, {problems[0][0]!r}: {problems[0][1]}"
        )
    return problems


def class_names_of(paths: list[str], folder: Path) -> list[str]:
    """List the top-level sub-folders that hold an image."""
    classes = sorted({path.split("/")[0] for path in paths if "/" in path})
    if not classes:
        raise UsageError(f"folder labels asked for, but no image in {str(folder)!r} lies in a sub-folder")
    return classes


def labels_of(paths: list[str], classes: list[str]) -> Tensor:
    number = {class_name: i for i, class_name in enumerate(classes)}
    return torch.tensor([number[path.split("/")[0]] if "/" in path else -1 for path in paths])


def listing_under(cache: Path, root: Path) -> Path:
    """Return the file in which the listing of a folder is kept."""
    return Path(f"{kept_under(cache, root)}.listing")


def kept_under(cache: Path, root: Path) -> str:
    """Return what the names of files start with that are kept of a folder: named after it and its place."""
    place = os.path.realpath(root)
    digest = hashlib.blake2b(os.fsencode(place), digest_size=6).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9]+", "-", os.path.basename(place))[:40]
    return f"{cache.expanduser()}/{stem}-{digest}"


def _check_room(file: BinaryIO, count: int, image_size: int) -> None:
    """Raise a UsageError where the images cannot fit the disk of `file`."""
    disk = os.fstatvfs(file.fileno())
    needed, free = 3 * count * image_size**2, disk.f_bavail * disk.f_frsize
    if needed > free:
        raise UsageError(
            f"{count} decoded images of {image_size} x {image_size} pixels need {needed / 1e9:.1f} GB of disk, and "
            f"{free / 1e9:.1f} GB are free: choose a smaller image size, or a folder elsewhere with --data.cache"
        )
