from __future__ import annotations

from collections.abc import Iterator

import pytest
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
