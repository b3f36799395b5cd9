"""A named data set or a folder, as a set of images."""

from __future__ import annotations

from pathlib import Path

from iic_dist.data.folder import Reading, load_folder
from iic_dist.data.image_set import ImageSet
from iic_dist.data.listing import Unreadable
from iic_dist.data.named import LOADERS, load_named, splits
from iic_dist.errors import UsageError

DATA_NAMES = tuple(LOADERS)


def load_image_set(
    name: str,
    root: Path,
    split: str,
    *,
    image_size: int | None = None,
    folder_labels: bool = False,
    reading: Reading | None = None,
    download: bool = True,
    unreadable: Unreadable | None = None,
) -> ImageSet:
    """Load a named data set, or the images of a folder.

    Args:
        name: One of DATA_NAMES, or "folder:DIR".
        root: Where the named sets lie, in torchvision's layout; not used for a folder.
        split: "train", "test" or "all" (train followed by test); "unlabelled" of stl10. A folder has one
            split, which answers to "all" and to "train".
        image_size: Side in pixels that a folder's images get (default 96); a named set has its own.
        folder_labels, reading, unreadable: As `labels`, `reading` and `unreadable` of `load_folder`; not used for a
            named set.
        download: Fetch a named set that is not there. At most one process of a machine may: under torchrun
            local rank 0 goes first, then the others without.

    Raises:
        UsageError: an unknown name or split, a set that is missing or damaged, a folder without images that
            can be read, or whose decoded images find no room.
    """
    is_folder = name.startswith("folder:")
    if not is_folder and name not in DATA_NAMES:
        raise UsageError(f"unknown data set {name!r}: use one of {', '.join(DATA_NAMES)}, or folder:DIR")
    allowed = ("all", "train") if is_folder else splits(name)
    if split not in allowed:
        raise UsageError(f"data set {name!r} has no split {split!r}: use one of {', '.join(allowed)}")
    if image_size is not None and image_size < 1:
        raise UsageError(f"the image size must be at least 1 pixel, got {image_size}")
    if not is_folder:
        if image_size is not None:
            raise UsageError(
                f"the image size {image_size} is for folder:DIR only: data set {name!r} has its own, "
                "and the views choose theirs"
            )
        return load_named(name, root, split, download)
    directory = name.removeprefix("folder:")
    if not directory:
        raise UsageError("data set 'folder:' names no folder: use folder:DIR")
    return load_folder(
        Path(directory),
        reading,
        image_size=96 if image_size is None else image_size,
        labels=folder_labels,
        unreadable=unreadable,
    )
