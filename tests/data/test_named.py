"""Named sets, read from files in their real formats that the tests write; the network is never asked."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import pickle
import socket
import ssl
import struct
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision import datasets

from iic_dist.data import named
from iic_dist.data.load import DATA_NAMES, load_image_set
from iic_dist.errors import UsageError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("a test asked the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture(autouse=True)
def no_debian_package(monkeypatch, tmp_path):
    monkeypatch.setattr(named, "DEBIAN_FASHION_MNIST", tmp_path / "no-such-package")


def random_bytes(*shape: int, seed: int = 0, below: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, size=shape, dtype=np.uint8)


def load(name: str, root: Path, split: str, **options):
    return load_image_set(name, root, split, download=False, **options)


def error_line(name: str, root: Path, split: str = "train", download: bool = False) -> str:
    with pytest.raises(UsageError) as caught:
        load_image_set(name, root, split, download=download)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")])
def test_idx_files(tmp_path, name, folder, packed):
    for split, (images, labels) in write_mnist(tmp_path / folder, packed).items():
        image_set = load(name, tmp_path, split)
        assert image_set.name == name
        assert image_set.images.dtype == torch.uint8
        assert image_set.labels.dtype == torch.int64
        assert np.array_equal(image_set.images.numpy(), images[:, None])
        assert image_set.labels.tolist() == labels.tolist()
        assert image_set.num_classes == 10


def test_fashion_mnist_from_debians_folder_and_the_root_goes_first(tmp_path, monkeypatch):
    packaged = write_mnist(tmp_path / "package", packed=True, seed=0)
    monkeypatch.setattr(named, "DEBIAN_FASHION_MNIST", tmp_path / "package")
    root = tmp_path / "root"
    # With download=True, too: what is on the disk is not fetched.
    image_set = load_image_set("fashion-mnist", root, "train", download=True)
    assert np.array_equal(image_set.images.numpy(), packaged["train"][0][:, None])
    assert image_set.class_names[9] == "Ankle boot"
    assert not root.exists()
    own = write_mnist(root / "FashionMNIST" / "raw", packed=False, seed=50)
    assert np.array_equal(load("fashion-mnist", root, "test").images.numpy(), own["test"][0][:, None])


def test_debians_own_package(monkeypatch, tmp_path):
    package = Path("/usr/share/datasets/fashion-mnist")
    if not package.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    monkeypatch.setattr(named, "DEBIAN_FASHION_MNIST", package)
    image_set = load("fashion-mnist", tmp_path, "test")
    assert image_set.images.shape == (10000, 1, 28, 28)
    assert image_set.labels.bincount().tolist() == [1000] * 10
    assert image_set.labels[:6].tolist() == [9, 2, 1, 1, 6, 1]  # the well-known start of its test split
    with gzip.open(package / "t10k-images-idx3-ubyte.gz") as file:
        assert image_set.images.numpy().tobytes() == file.read()[16:]


def damage_truncated(folder: Path) -> None:
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(b"<html>404 not found</html>")


def damage_empty(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(b"")


def damage_wrong_type(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x0a\x01" + bytes(20))  # 10 is no type of the format


def damage_signed_labels(folder: Path) -> None:
    labels = bytearray(idx(np.zeros(12, dtype=np.uint8)))
    labels[2] = 9  # signed byte
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)


def damage_labels_too_large(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.full(12, 10, dtype=np.uint8)))


def damage_too_few_labels(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(11, dtype=np.uint8)))


def damage_is_a_folder(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").unlink()
    (folder / "train-labels-idx1-ubyte").mkdir()


def damage_gz_truncated(folder: Path) -> None:
    file = folder / "train-images-idx3-ubyte"
    (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes())[:-2000])
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress((folder / "train-labels-idx1-ubyte").read_bytes())
    )
    file.unlink()


def damage_gz_is_text(folder: Path) -> None:
    damage_gz_truncated(folder)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"<html>404 not found</html>")


def damage_gz_flipped(folder: Path) -> None:
    damage_gz_truncated(folder)
    file = folder / "train-images-idx3-ubyte.gz"
    packed = bytearray(gzip.compress(idx(random_bytes(12, 28, 28))))
    packed[10] = 0xFF  # behind the header: a block of a type that does not exist
    file.write_bytes(packed)


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncated,
        damage_header,
        damage_empty,
        damage_wrong_type,
        damage_signed_labels,
        damage_labels_too_large,
        damage_too_few_labels,
        damage_is_a_folder,
        damage_gz_truncated,
        damage_gz_is_text,
        damage_gz_flipped,
    ],
)
def test_damaged_idx_files_are_one_line(tmp_path, damage):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder, packed=False)
    damage(folder)
    line = error_line("mnist", tmp_path)
    assert repr(str(folder)) in line
    assert "train-images-idx3-ubyte" in line


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
