"""Named sets, read from files in their real formats that the tests write; the network is never asked."""

from __future__ import annotations

import hashlib
import http.client
import pickle
import socket
import ssl
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from named_sets import error_line, load, random_bytes, write_mnist
from sklearn.datasets import load_digits
from torchvision import datasets

from iic_dist.data.load import DATA_NAMES, load_image_set
from iic_dist.errors import UsageError

pytestmark = pytest.mark.usefixtures("no_network", "no_debian_package")


# --- digits


def test_digits_are_scikit_learns_scaled_to_bytes(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    everything = load("digits", tmp_path, "all")
    train, test = load("digits", tmp_path, "train"), load("digits", tmp_path, "test")
    assert everything.images.shape == (1797, 1, 8, 8)
    assert everything.images.dtype == torch.uint8
    assert everything.num_classes == 10
    test_places = list(range(4, 1797, 5))
    train_places = [i for i in range(1797) if i % 5 != 4]
    for image_set, places in (
        (train, train_places),
        (test, test_places),
        (everything, train_places + test_places),
    ):
        sixteenths = image_set.images.double().flatten(1).numpy() / 255 * 16
        assert np.abs(sixteenths - pixels[places]).max() <= 0.5 / 255 * 16  # half a byte
        assert image_set.labels.tolist() == labels[places].tolist()
    assert (everything.images.min(), everything.images.max()) == (0, 255)


# --- CIFAR: pickles with known md5


def write_pickles(monkeypatch, kind, folder: Path, files: dict[str, dict], meta: dict) -> None:
    """Write the pickles, and make torchvision expect the md5 that they have."""
    folder.mkdir(parents=True)
    for name, content in {**files, kind.meta["filename"]: meta}.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for split in ("train_list", "test_list"):
        monkeypatch.setattr(kind, split, [[name, md5(name)] for name, _ in getattr(kind, split)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(kind.meta["filename"])})


@pytest.fixture
def cifar10(monkeypatch, tmp_path):
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = {name: random_bytes(3, 3, 32, 32, seed=i) for i, name in enumerate(names)}
    labels = {name: random_bytes(3, seed=i, below=10).tolist() for i, name in enumerate(names)}
    files = {name: {"data": pixels[name].reshape(3, -1), "labels": labels[name]} for name in names}
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    write_pickles(monkeypatch, datasets.CIFAR10, tmp_path / "cifar-10-batches-py", files, meta)
    return pixels, labels


def test_cifar10(tmp_path, cifar10):
    pixels, labels = cifar10
    for split, names in (("train", list(pixels)[:5]), ("test", ["test_batch"]), ("all", list(pixels))):
        image_set = load("cifar10", tmp_path, split)
        assert np.array_equal(image_set.images.numpy(), np.concatenate([pixels[name] for name in names]))
        assert image_set.labels.tolist() == np.concatenate([labels[name] for name in names]).tolist()
        assert image_set.labels.dtype == torch.int64
        assert image_set.images.is_contiguous()
        assert image_set.class_names == tuple(f"class {i}" for i in range(10))


def test_a_flipped_byte_in_cifar10_is_one_line_and_no_unpickling(tmp_path, cifar10):
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    line = error_line("cifar10", tmp_path)
    assert "missing or damaged" in line
    assert "cifar-10-python.tar.gz" in line


def test_cifar100_has_its_20_superclasses(tmp_path, monkeypatch):
    pixels = {split: random_bytes(4, 3, 32, 32, seed=i) for i, split in enumerate(("train", "test"))}
    coarse = {"train": [19, 0, 7, 7], "test": [3, 19, 1, 0]}
    files = {
        split: {
            "data": pixels[split].reshape(4, -1),
            "fine_labels": [99, 98, 97, 96],
            "coarse_labels": coarse[split],
        }
        for split in ("train", "test")
    }
    meta = {
        "fine_label_names": [f"fine {i}" for i in range(100)],
        "coarse_label_names": [f"coarse {i}" for i in range(20)],
    }
    write_pickles(monkeypatch, datasets.CIFAR100, tmp_path / "cifar-100-python", files, meta)
    for split, parts in (("train", ["train"]), ("test", ["test"]), ("all", ["train", "test"])):
        image_set = load("cifar100-20", tmp_path, split)
        assert np.array_equal(image_set.images.numpy(), np.concatenate([pixels[part] for part in parts]))
        assert image_set.labels.tolist() == np.concatenate([coarse[part] for part in parts]).tolist()
        assert image_set.class_names == tuple(f"coarse {i}" for i in range(20))
        assert image_set.num_classes == 20


# --- STL-10: column-major bytes, labels from 1


@pytest.fixture
def stl10(monkeypatch, tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = {name: random_bytes(3, 3, 96, 96, seed=i) for i, name in enumerate(("train", "test", "unlabeled"))}
    labels = {"train": [0, 9, 4], "test": [5, 5, 1]}
    for name, pixels in images.items():
        (folder / f"{name}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())  # column by column
    for name, numbers in labels.items():
        (folder / f"{name}_y.bin").write_bytes(bytes(number + 1 for number in numbers))
    for part in ("train_list", "test_list"):
        files = [name for name, _ in getattr(datasets.STL10, part)]
        table = [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name in files]
        monkeypatch.setattr(datasets.STL10, part, table)
    return images, labels


def test_stl10(tmp_path, stl10):
    images, labels = stl10
    for split, parts in (("train", ["train"]), ("test", ["test"]), ("all", ["train", "test"])):
        image_set = load("stl10", tmp_path, split)
        assert np.array_equal(image_set.images.numpy(), np.concatenate([images[part] for part in parts]))
        assert image_set.images.is_contiguous()
        assert image_set.labels.tolist() == np.concatenate([labels[part] for part in parts]).tolist()
        assert image_set.labels.dtype == torch.int64
        assert image_set.class_names[:2] == ("airplane", "bird")
        assert image_set.num_classes == 10


def test_stl10_unlabelled_has_no_labels(tmp_path, stl10):
    image_set = load("stl10", tmp_path, "unlabelled")
    assert np.array_equal(image_set.images.numpy(), stl10[0]["unlabeled"])
    assert image_set.labels is None
    assert image_set.num_classes == 0


def test_stl10_with_a_label_of_zero_is_one_line(tmp_path, stl10, monkeypatch):
    (tmp_path / "stl10_binary" / "train_y.bin").write_bytes(bytes([0, 1, 2]))
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    assert "its files are damaged" in error_line("stl10", tmp_path)


# --- what is not there
DOWNLOADERS = {
    "mnist": "mnist",
    "fashion-mnist": "mnist",
    "cifar10": "cifar",
    "cifar100-20": "cifar",
    "stl10": "stl10",
}


@pytest.mark.parametrize("name", DOWNLOADERS)
def test_a_missing_set_is_one_line_that_says_how_to_get_it(tmp_path, name):
    line = error_line(name, tmp_path)
    assert f"data set {name!r} cannot be read from {str(tmp_path)!r}"[:-1] in line
    assert "no download was asked for" in line
    assert any(file in line for file in ("train-images-idx3-ubyte", "data_batch_1", "meta", "train,test,unl"))
    assert ("dataset-fashion-mnist" in line) == (name == "fashion-mnist")
    assert list(tmp_path.iterdir()) == []


HOST = "data.example.invalid"


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            urllib.error.URLError(socket.gaierror(-2, "Name or service not known")),
            "Name or service not known",
        ),
        (urllib.error.URLError(ssl.SSLCertVerificationError(1, f"certificate of '{HOST}'")), "SSLCertVerif"),
        (urllib.error.URLError(f"unknown scheme at {HOST}"), "the download failed"),
        (urllib.error.HTTPError(f"http://{HOST}/x", 403, "Forbidden", None, None), "HTTP status 403"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (TimeoutError(f"{HOST} timed out"), "TimeoutError"),
        (http.client.IncompleteRead(b"12"), "IncompleteRead"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("File not found or corrupted."), "checksum"),
        (EOFError("Compressed file ended"), "damaged"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.parametrize("name", ["mnist", "cifar10", "stl10"])
def test_a_failed_download_is_one_line_without_a_host_name(tmp_path, monkeypatch, name, failure, reason):
    def fail(*args, **kwargs):
        raise failure

    module = getattr(datasets, DOWNLOADERS[name])
    monkeypatch.setattr(module, "download_and_extract_archive", fail)
    line = error_line(name, tmp_path / "data", download=True)
    swallowed = name == "mnist" and isinstance(failure, urllib.error.URLError | RuntimeError)
    assert ("the download failed" if swallowed else reason) in line  # MNIST tries its mirrors and sums up
    assert "http" not in line
    for host in (HOST, "amazonaws", "lecun", "toronto", "stanford"):
        assert host not in line


def test_a_root_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for name in DOWNLOADERS:
        assert "directory" in error_line(name, tmp_path / "file" / "data", download=True)


def test_what_is_there_is_not_downloaded(tmp_path, cifar10):
    write_mnist(tmp_path / "MNIST" / "raw", packed=True)
    assert len(load_image_set("mnist", tmp_path, "all", download=True).images) == 17
    assert len(load_image_set("cifar10", tmp_path, "all", download=True).images) == 18


# --- names and splits


def test_an_unknown_name_quotes_the_known_ones(tmp_path):
    line = error_line("cifar-10", tmp_path)
    assert "'cifar-10'" in line
    assert all(name in line for name in DATA_NAMES)
    assert "folder:DIR" in line


@pytest.mark.parametrize(
    ("name", "split"),
    [(name, split) for name in DATA_NAMES for split in ("validation", "")]
    + [(name, "unlabelled") for name in DATA_NAMES if name != "stl10"],
)
def test_a_split_that_a_set_does_not_have_quotes_the_allowed_ones(tmp_path, name, split):
    line = error_line(name, tmp_path, split)
    assert f"no split {split!r}: use one of train, test, all" in line
    assert ("unlabelled" in line.partition(": use")[2]) == (name == "stl10")


def test_an_image_size_is_for_folders_only(tmp_path):
    with pytest.raises(UsageError, match="image size 32 is for folder:DIR only"):
        load("digits", tmp_path, "train", image_size=32)
