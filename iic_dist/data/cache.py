"""Decoded images, or features of them, as one file that is mapped into memory instead of being read.

The file holds the pixels, (M, C, S, S) uint8, from its first byte on; then its contents as JSON (`Contents`); and in
its last 16 bytes the length of the JSON, the JSON's CRC-32 and `MAGIC`. Writing it is sequential, a file that was cut
short has no end, and a flipped bit anywhere fails a checksum. A file of features (`iic_dist.data.features`) holds
(M, F) numbers in the place of the pixels.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from iic_dist.data.decode import Decoded
from iic_dist.data.listing import Unreadable
from iic_dist.errors import UsageError
from iic_dist.files import sync_folder

Fill = Callable[[BinaryIO], None]

MAGIC = b"iicimg1\n"
_END = struct.Struct("<II8s")
_BLOCK = 2**26
"""Bytes of pixels that one checksum covers."""

_log = logging.getLogger(__name__)
_NOT_KEPT = (
    "decoded images cannot be kept in %s (%s): each process of this run decodes them for itself; name another folder "
    "with --data.cache"
)


class Unusable(Exception):
    """The file holds other images than those that are asked for, or is damaged; says which."""


@dataclass(frozen=True)
class Contents:
    """What a file of decoded images or of features holds.

    Attributes:
        source: Names all that the pixels depend on; images of another source are stale.
        shape: (M, C, S, S) of the pixels, (M, F) of features.
        checksums: CRC-32 of each 64 MiB of the pixels.
        paths: Of the files that the images were decoded from.
        malformed: Of those that could not be.
        dtype: Of a pixel or a feature, by NumPy's name.
    """

    source: str
    shape: tuple[int, ...]
    checksums: list[int]
    paths: list[str]
    malformed: Unreadable
    dtype: str = "uint8"

    @property
    def nbytes(self) -> int:
        """Length of what is mapped, bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def checksum(self) -> int:
        """A number from 0 to 2^32 - 1 for the images and their order."""
        return zlib.crc32(json.dumps([self.shape, self.checksums, self.paths]).encode())


def read(file: BinaryIO, source: str, *, verify: bool, progress: bool = False) -> tuple[Tensor, Contents]:
    """Map the images of an open file into memory.

    Args:
        file: May be closed afterwards.
        source: What the images are to be of.
        verify: Read all pixels and compare their checksums; at the speed of the disk or, where the file is in
            memory already, of some GB a second and core.
        progress: Show a progress bar if that takes more than two seconds.

    Returns:
        (M, C, S, S) uint8, not to be written to, and what is known of them.

    Raises:
        Unusable: the images are of another source, or the file is damaged.
    """
    contents = _read_contents(file)
    if contents.source != source:
        raise Unusable("it is of other files or another size")
    pixels = _map(file, contents.nbytes)
    if verify:
        for number, (found, wanted) in enumerate(zip(_checksums(pixels, progress), contents.checksums, strict=True)):
            if found != wanted:
                raise Unusable(f"it is damaged: the checksum of bytes {number * _BLOCK} and following is wrong")
    return torch.from_numpy(pixels.view(contents.dtype)).view(contents.shape), contents


def _read_contents(file: BinaryIO) -> Contents:
    size = file.seek(0, os.SEEK_END)
    try:
        file.seek(size - _END.size)
        length, checksum, magic = _END.unpack(file.read(_END.size))
        file.seek(size - _END.size - length)
        text = file.read(length)
    except (OSError, ValueError, struct.error) as error:
        raise Unusable("it is damaged: it is too short") from error
    if magic != MAGIC or zlib.crc32(text) != checksum:
        raise Unusable("it is damaged: its end is missing or wrong")
    contents = Contents(**json.loads(text))
    if contents.nbytes + length + _END.size != size:
        raise Unusable("it is damaged: it has another length")
    return contents


def _map(file: BinaryIO, size: int) -> np.ndarray:
    """Map the first bytes; copy on write, because torch knows no memory that must not be written to."""
    return np.memmap(file, np.uint8, mode="c", shape=(size,)) if size else np.empty(0, np.uint8)


def _checksums(pixels: np.ndarray, progress: bool) -> Iterator[int]:
    blocks = [pixels[start : start + _BLOCK] for start in range(0, len(pixels), _BLOCK)]
    with (
        ThreadPoolExecutor() as threads,
        tqdm(
            desc="checking decoded images", total=len(pixels), unit="B", unit_scale=True, delay=2, disable=not progress
        ) as bar,
    ):
        for block, checksum in zip(blocks, threads.map(zlib.crc32, blocks), strict=True):
            bar.update(len(block))
            yield checksum


def write(file: BinaryIO, source: str, image_size: int, chunks: Iterable[Decoded]) -> None:
    """Fill an open file with decoded images; it is on the disk when this returns.

    If no pixel of any of them has a colour, one channel is kept.

    Args:
        file: Open for reading and writing.
        source: Names all that the pixels depend on.
        image_size: S, side of the images.
        chunks: What is to be written, in order.
    """
    file.truncate(0)
    paths: list[str] = []
    malformed: Unreadable = []
    channels = 1
    for chunk in chunks:
        file.write(chunk.images.tobytes())
        paths += chunk.paths
        malformed += chunk.malformed
        channels = 3 if chunk.has_colour else channels
    if channels == 1:
        _keep_one_channel(file, len(paths), image_size**2)
    finish(file, Contents(source, (len(paths), channels, image_size, image_size), [], paths, malformed))


def finish(file: BinaryIO, contents: Contents) -> None:
    """Write the end of a file behind its pixels or features; it is on the disk when this returns.

    Args:
        file: Open for reading and writing.
        contents: Without the checksums.
    """
    file.flush()
    checksums = list(_checksums(_map(file, contents.nbytes), progress=False))
    text = json.dumps(asdict(replace(contents, checksums=checksums))).encode()
    file.seek(0, os.SEEK_END)
    file.write(text + _END.pack(len(text), zlib.crc32(text), MAGIC))
    file.flush()
    os.fsync(file.fileno())


def _keep_one_channel(file: BinaryIO, images: int, pixels: int) -> None:
    """Move the first of three equal channels of every image together; what is overwritten has been read before."""
    step = max(1, _BLOCK // (3 * pixels))
    for start in range(0, images, step):
        file.seek(3 * start * pixels)
        rgb = np.frombuffer(file.read(3 * min(step, images - start) * pixels), np.uint8)
        file.seek(start * pixels)
        file.write(rgb.reshape(-1, 3, pixels)[:, 0].tobytes())
    file.truncate(images * pixels)


def read_or_build(
    path: Path | None, source: str, fill: Fill, *, verify: bool = True, progress: bool = False
) -> tuple[Tensor, Contents]:
    """Map the images of a file into memory; where it does not hold those of `source`, make it first.

    It gets its name when it is complete, so no process sees a part of it, and one that has mapped an older file keeps
    that. Of several processes that need it one makes it and the others wait.

    Args:
        path: The file. None, or with a warning where it cannot be made: a nameless temporary file, for this process.
        source: Names all that the pixels depend on.
        fill: Calls `write` on the file that it gets.
        verify, progress: As of `read`.

    Raises:
        UsageError: the images cannot be written to the disk.
    """
    if path is None:
        return _build_nameless(source, fill)
    before = _status(path)
    if found := read_if_usable(path, source, verify, progress):
        return found
    part = path.with_name(f"{path.name}.part")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(locked(part))
        except OSError as error:
            level = logging.WARNING if verify else logging.DEBUG  # one process of a machine says it
            _log.log(level, _NOT_KEPT, path.parent, error.strerror)
            return _build_nameless(source, fill)
        stack.enter_context(disk_errors(path.parent))
        try:
            made_since = not _same_file(before, _status(path))
            if made_since and (found := read_if_usable(path, source, verify, progress)):
                part.unlink()
                return found
            fill(file)
            found = read(file, source, verify=False)
        except BaseException:
            part.unlink()
            raise
        os.replace(part, path)  # from here on a file of the name `part` is another process's
        sync_folder(path.parent)
        return found


def _build_nameless(source: str, fill: Fill) -> tuple[Tensor, Contents]:
    with disk_errors(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
        fill(file)
        return read(file, source, verify=False)


@contextlib.contextmanager
def disk_errors(folder: Path, what: str = "decoded images") -> Iterator[None]:
    """Turn what the disk says into one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{what} cannot be kept in {str(folder)!r} ({error.strerror}): make room there, or name another "
            "folder with --data.cache"
        ) from error


def read_if_usable(path: Path, source: str, verify: bool, progress: bool) -> tuple[Tensor, Contents] | None:
    """Read a file; None where there is none, or none that can be used, which is said."""
    try:
        with path.open("rb") as file:
            return read(file, source, verify=verify, progress=progress)
    except Unusable as reason:
        _log.info("%s is not used and made anew: %s", path, reason)
    except OSError:  # mostly that there is none; if the folder cannot be used, making a file will tell
        pass
    return None


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[BinaryIO]:
    """Open a file for this process alone, and wait while another one has it.

    Raises:
        OSError: it cannot be opened, the file system has no locks, or another process has it and `wait` is false.
    """
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                _log.info("waiting for another process, which decodes images into %s", path)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _same_file(os.fstat(file.fileno()), _status(path)):
                continue  # its process has finished it, or given up
            try:
                yield file
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing it would not do: a child of this process may have it too
            return


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # there is none
        return None


def _same_file(one: os.stat_result | None, other: os.stat_result | None) -> bool:
    if one is None or other is None:
        return one is other
    return os.path.samestat(one, other)
