"""Data that some tests want and the repository does not hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


def data_file(name: str) -> Path:
    """Return a file of the folder IIC_DIST_DATA, or of shared/data beside the repository; skip where it is not."""
    folders = [Path(os.environ["IIC_DIST_DATA"])] if "IIC_DIST_DATA" in os.environ else []
    for folder in (*folders, _ROOT.parent / "shared" / "data"):
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is not there: name its folder with IIC_DIST_DATA")
