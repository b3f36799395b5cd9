"""The MNIST family, read from idx files that the tests write: raw, packed, packaged by Debian, damaged."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from named_sets import error_line, idx, load, random_bytes, write_mnist

from iic_dist.data import named
from iic_dist.data.load import load_image_set

pytestmark = pytest.mark.usefixtures("no_network", "no_debian_package")


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
