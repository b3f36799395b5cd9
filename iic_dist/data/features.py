"""Features of anything, one row each: from a file of the user's, or kept of images that a network has seen."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from iic_dist.data.cache import Contents, finish
from iic_dist.data.listing import Unreadable
from iic_dist.errors import UsageError
from iic_dist.wording import counted

PREFIX = "features:"

_DTYPES = ("float16", "float32", "float64")
_BLOCK = 2**26
"""Bytes of features that are looked at or written at a time."""


@dataclass(frozen=True)
class FeatureSet:
    """Features with, where they are known, the labels of what they are of.

    Attributes:
        name: What it was loaded by: "features:FILE.npy", or the name of the images.
        features: (N, F) float16, float32 or float64 on the CPU. Mostly mapped from a file and maybe more than the
            memory holds: take the rows that you need, and never write to them.
        labels: (N,) int64, or None where nothing is labelled. -1: no label, ignore it.
        class_names: The name of class i at place i; empty without labels.
        paths: Of a folder's images, the path of each below the folder; else empty.
        checksum: Of features and paths, from 0 to 2^32 - 1.
        image_shape: (C, H, W) of the images that they were made of; None where there are none.
    """

    name: str
    features: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    checksum: int = 0
    image_shape: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def num_classes(self) -> int:
        """Number of labelled classes; 0 without labels."""
        return len(self.class_names)


@dataclass(frozen=True)
class Embedded:
    """Some files one after the other, as features.

    Attributes:
        features: (n, F) on the CPU.
        paths: The n relative paths.
        malformed: Files among them that could not be decoded.
    """

    features: Tensor
    paths: list[str]
    malformed: Unreadable


def noun_of(name: str) -> str:
    """Say what a set of this `data.name` consists of: a row may be one of anything."""
    return "row" if name.startswith(PREFIX) else "image"


def load_features(path: Path, labels: Path | None = None, fewest: int = 2) -> FeatureSet:
    """Map features from a NumPy file.

    Every number is looked at once, a block at a time, and none is kept in memory.

    Args:
        path: FILE.npy with (N, F) float16, float32 or float64.
        labels: A file of N labels, for evaluation alone: whole numbers from 0 on, -1 for none, or words. Default:
            FILE.labels.npy, if it is there.
        fewest: Rows that must be there; what is to be clustered needs 2.

    Raises:
        UsageError: there is no such file, it is damaged, of another shape or dtype, or holds NaN or Inf; or the labels
            do not fit.
    """
    path = path.expanduser()
    array = _open(path, "features")
    if array.ndim != 2 or array.dtype.name not in _DTYPES or not array.dtype.isnative:
        raise UsageError(
            f"features {str(path)!r}: {array.dtype.str} of shape {array.shape}: must be (N, F) of "
            f"{', '.join(_DTYPES)}, one row for each thing"
        )
    count, width = array.shape
    if count < fewest or width < 1:
        needed = "it is empty" if fewest < 2 else f"clusters need at least {fewest} rows"
        raise UsageError(f"features {str(path)!r}: {counted(count, 'row')} of {counted(width, 'feature')}: {needed}")
    checksum = zlib.crc32(json.dumps([array.shape, array.dtype.name]).encode())
    for start, block in blocks(array):
        if not (finite := np.isfinite(block)).all():
            row = start + int((~finite).any(1).argmax())
            raise UsageError(f"features {str(path)!r}: row {row} (of {count}, from 0) holds NaN or Inf: leave it out")
        checksum = zlib.crc32(block.tobytes(), checksum)
    beside = path.with_suffix(".labels.npy")
    known = labels.expanduser() if labels is not None else beside if beside.is_file() else None
    numbers, names = (None, ()) if known is None else _read_labels(known, count)
    return FeatureSet(f"{PREFIX}{path}", torch.from_numpy(array), numbers, names, checksum=checksum)


def blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Cut an array (N, F) into blocks of some rows: the number of the first one, and the rows."""
    step = max(1, _BLOCK // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def write_features(
    file: BinaryIO, source: str, num_features: int, dtype: torch.dtype, chunks: Iterable[Embedded]
) -> None:
    """Fill an open file with features, in the format of `iic_dist.data.cache`; it is on the disk when this returns.

    Args:
        file: Open for reading and writing.
        source: Names all that the features depend on.
        num_features: F.
        dtype: What the features are kept as.
        chunks: What is to be written, in order.
    """
    file.truncate(0)
    paths: list[str] = []
    malformed: Unreadable = []
    for chunk in chunks:
        file.write(chunk.features.to(dtype).contiguous().numpy().tobytes())
        paths += chunk.paths
        malformed += chunk.malformed
    name = str(dtype).removeprefix("torch.")
    finish(file, Contents(source, (len(paths), num_features), [], paths, malformed, name))


def _open(path: Path, what: str) -> np.ndarray:
    """Map a .npy file; copy on write, because torch knows no memory that must not be written to."""
    if path.suffix != ".npy":
        raise UsageError(f"{what} {str(path)!r}: must be a file .npy, as numpy.save writes it")
    if not path.is_file():
        raise UsageError(f"{what} {str(path)!r}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:  # NumPy's own words tell how to run what may be in the file
        raise UsageError(
            f"{what} {str(path)!r} cannot be read: not a .npy of numbers, or cut short; write it with numpy.save"
        ) from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{what} {str(path)!r}: holds several arrays: save one with numpy.save")
    return array


def _read_labels(path: Path, count: int) -> tuple[Tensor, tuple[str, ...]]:
    array = _open(path, "labels")
    if array.shape != (count,) or array.dtype.kind not in "iuU":
        raise UsageError(
            f"labels {str(path)!r}: {array.dtype.str} of shape {array.shape}: must be ({count},) whole numbers or "
            "words, one for each row of the features"
        )
    if array.dtype.kind == "U":
        names, numbers = np.unique(array, return_inverse=True)
        return torch.from_numpy(numbers.astype(np.int64)), tuple(map(str, names))
    numbers = np.array(array, dtype=np.int64)
    least, largest = int(numbers.min()), int(numbers.max())
    if least < -1 or largest < 0 or largest >= count:
        raise UsageError(
            f"labels {str(path)!r}: from {least} to {largest}: must be classes counted from 0 on, or -1 for none"
        )
    return torch.from_numpy(numbers), tuple(str(number) for number in range(largest + 1))
