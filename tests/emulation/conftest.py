from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulation
import pytest


@pytest.fixture(scope="session")
def compiled() -> Path:
    """The kernels of this tree for the emulated device; compiled once, until a source changes."""
    why_not = emulation.why_not()
    if why_not is not None:
        pytest.skip(why_not)
    return emulation.build(emulation.BUILD)


@pytest.fixture
def ops(compiled: Path, one_thread: None) -> Iterator[Any]:
    """The ops on the emulated device; tensors of the test are watched."""
    with emulation.running(compiled):
        yield emulation.ops(compiled)
