from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import small_runs
import torch
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes with gloo groups of the first 1, 2, 3 and 4 of them."""
    pool = Ranks(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    """Two processes, for what talks to all ranks there are."""
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: several that wait for each other are slow on a busy machine, and small steps gain nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gray_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 90 gray digits, 8 x 8, in three sub-folders."""
    return small_runs.write_digits(tmp_path_factory.mktemp("gray"), 90)


@pytest.fixture(scope="session")
def gray_run(tmp_path_factory: pytest.TempPathFactory, gray_images: Path) -> Path:
    """A run of three clusters on them; its figures are those of a few seconds."""
    options = ["--train.epochs", "8", "--model.sub_heads", "3"]
    return small_runs.train_on(gray_images, tmp_path_factory.mktemp("runs"), *options)


@pytest.fixture(scope="session")
def colour_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three clusters on 30 images of 12 x 12 in colour."""
    folder = small_runs.write_colours(tmp_path_factory.mktemp("colours"), 30)
    options = ["--train.epochs", "1", "--model.sub_heads", "2", "--model.backbone", "small_cnn"]
    return small_runs.train_on(folder, tmp_path_factory.mktemp("runs"), *options)
