from __future__ import annotations

from pathlib import Path

import pytest
from launched import LAUNCH, SMALL, end, output, start


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small training on two ranks of one machine, to which nothing happened."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    process = start(LAUNCH / "local.sh", *SMALL, "--run.name", "undisturbed", cwd=cwd, RANKS="2")
    try:
        assert process.wait(timeout=300) == 0, output(cwd)
    finally:
        end(process)
    return cwd / "runs" / "undisturbed"
