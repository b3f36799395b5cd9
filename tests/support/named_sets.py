"""Named sets as the tests write and load them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iic_dist.data.image_set import ImageSet
from iic_dist.data.load import load_image_set
from iic_dist.errors import UsageError


def random_bytes(*shape: int, seed: int = 0, below: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, size=shape, dtype=np.uint8)


def load(name: str, root: Path, split: str, **options: Any) -> ImageSet:
    """Load a set that is there; nothing is downloaded."""
    return load_image_set(name, root, split, download=False, **options)


def error_line(name: str, root: Path, split: str = "train", download: bool = False) -> str:
    with pytest.raises(UsageError) as caught:
        load_image_set(name, root, split, download=download)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the MNIST family: idx files
def idx(array: np.ndarray) -> bytes:
    """The format of the MNIST page: two zero bytes, type (8: unsigned byte), rank, big-endian sizes, data."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, packed: bool, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(parents=True)
    written = {}
    for split, stem, count in (("train", "train", 12), ("test", "t10k", 5)):
        images, labels = random_bytes(count, 28, 28, seed=seed), random_bytes(count, seed=seed + 1, below=10)
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            data = idx(array)
            (folder / f"{name}{'.gz' if packed else ''}").write_bytes(gzip.compress(data) if packed else data)
        written[split] = images, labels
        seed += 2
    written["all"] = tuple(np.concatenate(pair) for pair in zip(written["train"], written["test"], strict=True))
    return written
