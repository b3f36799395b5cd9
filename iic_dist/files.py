"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def temporary_of(path: Path) -> Path:
    """Return where what will be `path` is collected: in the same folder, so that it can be moved."""
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash, a kill or a full disk leaves the old one or the new one, never a part.

    Raises:
        OSError: it could not be written; the old one is intact and nothing temporary is left.
    """
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give another path of the same name to write to; what lies there, and beside it, is moved when it is complete.

    For what writes files by itself, as libraries do, which may put some of it into a second file.

    Raises:
        OSError: it could not be written; the old one is intact and nothing temporary is left.
    """
    part = temporary_of(path)
    _remove(part)
    part.mkdir()
    try:
        yield part / path.name
        written = sorted(part.iterdir(), key=lambda each: each.name == path.name)  # last, for it may name the others
        for each in written:
            with each.open("rb+") as file:
                os.fsync(file.fileno())
        for each in written:
            os.replace(each, path.parent / each.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(path.parent)


def check_writable(path: Path) -> None:
    """Write a little where a file is to come, and remove it: better now than after hours of work.

    Raises:
        OSError: the file could not be written: its folder is missing, full or closed, or something else has its name.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists():
        path.open("rb+").close()
    part = temporary_of(path)
    _remove(part)
    try:
        with part.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    finally:
        part.unlink(missing_ok=True)


def _remove(part: Path) -> None:
    """Remove what a process that was killed has left."""
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
