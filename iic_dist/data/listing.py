"""Which files under a folder are its images: found by name, in one order; opened only where a name has no ending."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from iic_dist.data.formats import ENDINGS, ending_of, holds_image, known_endings
from iic_dist.files import write_whole
from iic_dist.wording import counted, printable

_SHOWN = 6  # endings that are named of what is left out

Unreadable = list[tuple[str, str]]
"""Relative paths of what is passed over, each with the reason."""


@dataclass(frozen=True)
class Listing:
    """The image files under a folder.

    Attributes:
        paths: Relative paths, "/" between their parts, sorted part by part.
        refused: What must not be opened, with reasons.
        digest: Another one as soon as a file comes, goes, or changes its size or its time of change.
        left_out: Number of the other files by their ending, such as ".txt"; "" for those without.
    """

    paths: list[str]
    refused: Unreadable
    digest: str
    left_out: dict[str, int] = field(default_factory=dict)


def list_or_recall(root: Path, follow_links: bool, kept: Path | None, relist: bool) -> Listing:
    """List the image files under `root`, or read the listing that was kept of them.

    Args:
        root, follow_links: As of `list_images`.
        kept: File where the listing is kept, if that can be written; None: nowhere.
        relist: Look at the files. False: take what is kept, without asking whether it still holds; where nothing is
            kept, or under other settings, or it is damaged, look at the files, and keep what is found.
    """
    if kept is not None and not relist and (recalled := _recall(kept, follow_links)):
        return recalled
    listing = list_images(root, follow_links)
    if kept is not None:
        text = json.dumps(asdict(listing) | _found_by(follow_links))
        with contextlib.suppress(OSError):  # decoded images cannot be kept there either, and that is said
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, f"{zlib.crc32(text.encode())}\n{text}".encode())
    return listing


def _recall(kept: Path, follow_links: bool) -> Listing | None:
    try:
        checksum, text = kept.read_text().split("\n", 1)
    except (OSError, ValueError):
        return None
    if checksum != str(zlib.crc32(text.encode())):
        return None
    values = json.loads(text)
    if any(values.get(name) != value for name, value in _found_by(follow_links).items()):
        return None
    refused = [(path, reason) for path, reason in values["refused"]]
    return Listing(values["paths"], refused, values["digest"], values["left_out"])


def _found_by(follow_links: bool) -> dict[str, object]:
    """Return what a listing depends on beside the files."""
    return {"follow_links": follow_links, "endings": list(known_endings())}


def list_images(root: Path, follow_links: bool) -> Listing:
    """Find the image files under `root` by their names, those without an ending by their content.

    Hidden files and folders are passed over.

    Args:
        root: Where to look.
        follow_links: Also take symbolic links that lead out of the folder.
    """
    found: dict[str, os.stat_result] = {}
    refused: Unreadable = []
    left_out = Counter[str]()
    endings, base = known_endings(), os.path.realpath(root)
    pending = [("", False)]  # a folder, and whether a link led to it
    while pending:
        folder, linked = pending.pop()
        try:
            with os.scandir(root / folder) as scan:
                entries = [entry for entry in scan if not entry.name.startswith(".")]
        except OSError as error:
            refused.append((folder or ".", error.strerror or type(error).__name__))
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            is_link = entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
            ending = ending_of(entry.name)
            if not is_folder and ending not in endings and (ending or not _is_image(entry, base, follow_links)):
                left_out[ending] += 1
                continue
            problem = _link_problem(entry.path, base, follow_links, linked) if is_link else None
            if problem is not None:
                refused.append((path, problem))
            elif is_folder:
                pending.append((path, linked or is_link))
            else:
                _take_file(path, entry, found, refused)
    paths = sorted(found, key=lambda path: path.split("/"))
    return Listing(
        paths, refused, _digest(paths, found), dict(sorted(left_out.items(), key=lambda item: (-item[1], item[0])))
    )


def _is_image(entry: os.DirEntry[str], base: str, follow_links: bool) -> bool:
    """Whether something without an ending is a file that may be read, and holds an image."""
    if entry.is_symlink() and _link_problem(entry.path, base, follow_links, False) is not None:
        return False
    return entry.is_file() and holds_image(entry.path)


def _take_file(path: str, entry: os.DirEntry[str], found: dict[str, os.stat_result], refused: Unreadable) -> None:
    try:
        status = entry.stat()
    except OSError as error:  # gone since the folder was read
        refused.append((path, error.strerror or type(error).__name__))
        return
    if stat.S_ISREG(status.st_mode):
        found[path] = status
    else:
        refused.append((path, "not a regular file"))  # opening a named pipe would wait for ever


def _link_problem(link: str, base: str, follow_links: bool, linked: bool) -> str | None:
    """Say why a symbolic link must not be followed, or None."""
    try:
        target = os.path.realpath(link, strict=True)
    except OSError as error:
        return f"a symbolic link that leads nowhere ({error.strerror})"
    if not follow_links and os.path.commonpath([base, target]) != base:
        return "a symbolic link out of the image folder (--data.follow_links true takes it, predict --follow-links)"
    if os.path.isdir(target):
        parent = os.path.realpath(os.path.dirname(link))
        if os.path.commonpath([parent, target]) == target:
            return "a symbolic link back to a folder that it lies in"
        if linked:  # n folders that link to each other hold n! paths
            return "a symbolic link to a folder, inside a linked folder"
    return None


def _digest(paths: list[str], found: dict[str, os.stat_result]) -> str:
    lines = (f"{path}\0{found[path].st_size}\0{found[path].st_mtime_ns}\0" for path in paths)
    return hashlib.blake2b("".join(lines).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def listed(unreadable: Unreadable) -> str:
    """Write files that were passed over as lines of path, tab and reason."""
    return "".join(f"{printable(path)}\t{reason}\n" for path, reason in unreadable)


def left_out_line(left_out: Mapping[str, int]) -> str:
    """Say how many files of which endings are left out, the most frequent first."""
    shown = [f"{count} {printable(ending) or 'without an ending'}" for ending, count in left_out.items()]
    if len(shown) > _SHOWN:
        rest = list(left_out.values())[_SHOWN:]
        shown[_SHOWN:] = [f"{sum(rest)} of {counted(len(rest), 'other ending')}"]
    line = f"{counted(sum(left_out.values()), 'file')} left out: {', '.join(shown)}"
    needing = sorted(ending for ending in ENDINGS["HEIF"] if ending in left_out)
    return line + (f"; pip install pillow-heif makes {' and '.join(needing)} readable" if needing else "")
