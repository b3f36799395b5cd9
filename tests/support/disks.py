"""File systems of a few MiB that tests can fill up."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """Mount an empty file system of this size on `folder` for a while; skip the test where that is not allowed."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs Linux's mount and root")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def make_read_only(folder: Path) -> None:
    """Let nothing be written any more to the file system that `small_disk` has mounted."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def leave_room(folder: Path, kibibytes: int) -> None:
    """Fill the file system of `folder` up to this much."""
    ballast = fill(folder)
    os.truncate(ballast, ballast.stat().st_size - 1024 * kibibytes)


def fill(folder: Path) -> Path:
    """Take all room that is left in the file system of `folder`; return the file that takes it, bigger each time."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    return ballast
