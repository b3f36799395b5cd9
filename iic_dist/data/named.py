"""The named data sets: digits comes with scikit-learn, torchvision reads and downloads the others."""

from __future__ import annotations

import http.client
import pickle
import ssl
import tarfile
import tempfile
import urllib.error
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import extract_archive

from iic_dist.data.image_set import ImageSet
from iic_dist.errors import UsageError

# Where Debian's package dataset-fashion-mnist puts the four files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

Part = tuple[Tensor, Tensor | None, tuple[str, ...]]  # images, labels, class names

_TEN_DIGITS = tuple("0123456789")
_STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_IDX_FILES = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte "
    "(or the same with .gz)"
)
# The files that belong in each set's folder.
_FILES = {
    "mnist": _IDX_FILES,
    "fashion-mnist": f"{_IDX_FILES}; or install Debian's package dataset-fashion-mnist",
    "cifar10": "data_batch_1 to data_batch_5, test_batch and batches.meta (from cifar-10-python.tar.gz)",
    "cifar100-20": "train, test and meta (from cifar-100-python.tar.gz)",
    "stl10": "{train,test,unlabeled}_X.bin and {train,test}_y.bin (from stl10_binary.tar.gz)",
}
# What torchvision raises for a missing or damaged set, or for a download that fails (from its source).
_LOAD_ERRORS = (
    RuntimeError,  # not found, wrong md5, no mirror left; a tensor that is not as long as its header says
    OSError,  # URLError, disk, permissions, a bad gzip header
    ValueError,
    TypeError,
    LookupError,
    AssertionError,  # the idx reader's own checks
    EOFError,
    zlib.error,
    tarfile.TarError,
    pickle.UnpicklingError,
    http.client.HTTPException,
)


def splits(name: str) -> tuple[str, ...]:
    """List the splits of a named set."""
    return ("train", "test", "all", "unlabelled") if name == "stl10" else ("train", "test", "all")


def load_named(name: str, root: Path, split: str, download: bool) -> ImageSet:
    """Load a named set.

    "all" is "train" followed by "test". `digits` has no official split: images 4, 9, 14, ... of
    scikit-learn's are its test split (359 of 1797). CIFAR-100 comes with its 20 superclasses.

    Args:
        name: A key of LOADERS.
        root: Folder that holds the sets in torchvision's layout, such as root/MNIST/raw; ~ is expanded.
        split: One of `splits(name)`.
        download: Fetch a set that is not there; only one process of a machine may at a time.

    Raises:
        UsageError: the set is not there and cannot be fetched, or is damaged.
    """
    root = root.expanduser()
    names = ("train", "test") if split == "all" else (split,)
    images, labels, class_names = zip(*(LOADERS[name](root, part, download) for part in names), strict=True)
    return ImageSet(
        name,
        torch.cat(images) if len(images) > 1 else images[0],
        None if labels[0] is None else torch.cat(labels),
        class_names[0],
    )


def _digits(root: Path, split: str, download: bool) -> Part:
    pixels, labels = load_digits(return_X_y=True)
    test = np.arange(len(labels)) % 5 == 4
    chosen = test if split == "test" else ~test
    scaled = np.rint(pixels[chosen] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return torch.from_numpy(scaled), torch.from_numpy(labels[chosen]).long(), _TEN_DIGITS


def _mnist(root: Path, split: str, download: bool) -> Part:
    folder = root / "MNIST" / "raw"
    return _read("mnist", folder, download, lambda: (*_idx(datasets.MNIST, folder, split, download), _TEN_DIGITS))


def _fashion_mnist(root: Path, split: str, download: bool) -> Part:
    folder = root / "FashionMNIST" / "raw"
    if not _idx_files(folder, split) and _idx_files(DEBIAN_FASHION_MNIST, split):
        folder = DEBIAN_FASHION_MNIST
    names = tuple(datasets.FashionMNIST.classes)
    return _read(
        "fashion-mnist",
        folder,
        download,
        lambda: (*_idx(datasets.FashionMNIST, folder, split, download), names),
    )


def _idx(kind: type[datasets.MNIST], folder: Path, split: str, download: bool) -> tuple[Tensor, Tensor]:
    """Read the two idx files of a split, packed or not; without them, what torchvision finds or fetches."""
    files = _idx_files(folder, split)
    if not files:
        part = kind(folder.parent.parent, train=split == "train", download=download)
        return part.data.unsqueeze(1), part.targets
    with tempfile.TemporaryDirectory() as scratch:
        images, labels = (extract_archive(str(file), scratch) if file.suffix == ".gz" else str(file) for file in files)
        return read_image_file(images).unsqueeze(1), read_label_file(labels)


def _idx_files(folder: Path, split: str) -> list[Path]:
    """Find the image file and the label file of a split; an empty list unless both are there."""
    stem = "train" if split == "train" else "t10k"
    for ending in ("", ".gz"):
        files = [folder / f"{stem}-{kind}-ubyte{ending}" for kind in ("images-idx3", "labels-idx1")]
        if all(file.is_file() for file in files):
            return files
    return []


def _cifar10(root: Path, split: str, download: bool) -> Part:
    def load() -> Part:
        part = datasets.CIFAR10(root, train=split == "train", download=download)
        return _channels_first(part.data), torch.tensor(part.targets), tuple(part.classes)

    return _read("cifar10", root / datasets.CIFAR10.base_folder, download, load)


def _cifar100_20(root: Path, split: str, download: bool) -> Part:
    folder = root / datasets.CIFAR100.base_folder

    def load() -> Part:
        part = datasets.CIFAR100(root, train=split == "train", download=download)
        # torchvision keeps only the 100 fine labels; it has just verified the md5 of these two pickles.
        labels = _unpickle(folder / split)["coarse_labels"]
        names = _unpickle(folder / "meta")["coarse_label_names"]
        return _channels_first(part.data), torch.tensor(labels), tuple(names)

    return _read("cifar100-20", folder, download, load)


def _unpickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _stl10(root: Path, split: str, download: bool) -> Part:
    def load() -> Part:
        part = datasets.STL10(root, split={"unlabelled": "unlabeled"}.get(split, split), download=download)
        images = torch.from_numpy(part.data).contiguous()
        if split == "unlabelled":
            return images, None, ()
        return images, torch.from_numpy(part.labels).long(), _STL10_CLASSES

    return _read("stl10", root / datasets.STL10.base_folder, download, load)


LOADERS: dict[str, Callable[[Path, str, bool], Part]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar100-20": _cifar100_20,
    "stl10": _stl10,
}


def _read(name: str, folder: Path, download: bool, load: Callable[[], Part]) -> Part:
    """Call `load`; what torchvision raises becomes one line that says how to get the set."""
    try:
        images, labels, class_names = load()
        if labels is not None and (len(labels) != len(images) or labels.min() < 0 or labels.max() >= len(class_names)):
            raise ValueError("the labels do not fit the images")
    except _LOAD_ERRORS as error:
        raise UsageError(
            f"data set {name!r} cannot be read from {str(folder)!r} ({_reason(error, download)}): "
            f"this folder needs {_FILES[name]}"
        ) from error
    return images, labels, class_names


def _reason(error: Exception, download: bool) -> str:
    """Say in a few words what went wrong, without the addresses that torchvision's messages hold."""
    text = str(error)
    if isinstance(error, urllib.error.HTTPError):
        return f"the download failed: HTTP status {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"the download failed: {_system_reason(error.reason)}"
    if text.startswith("Error downloading"):  # the MNIST family, after its last mirror
        return "the download failed"
    if text.startswith("File not found or corrupted"):
        return "the download failed: wrong checksum"
    if text.startswith("Dataset not found"):
        return "missing or damaged" if download else "missing or damaged, and no download was asked for"
    if isinstance(error, OSError | http.client.HTTPException):
        return _system_reason(error)
    return "its files are damaged"


def _system_reason(error: object) -> str:
    # An SSL error's text names the host.
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.strerror:
        return error.strerror
    return type(error).__name__
