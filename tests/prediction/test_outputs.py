"""Tables of clusters: what cannot be asked of a whole folder of images alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iic_dist.errors import UsageError
from iic_dist.prediction import outputs
from iic_dist.prediction.outputs import Row


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rows = [Row("a/b.png", 3, 0.25, 1.0), Row(os.fsdecode(b"latin-\xe9.png"), 0, 0.5, None)]
    outputs.write_table(tmp_path / "c.parquet", rows)
    read = parquet.read_table(tmp_path / "c.parquet").to_pydict()
    assert read == {
        "path": ["a/b.png", "latin-\\xe9.png"],
        "cluster": [3, 0],
        "confidence": [0.25, 0.5],
        "agreement": [1.0, None],
    }


def test_parquet_without_a_library_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs pyarrow"):
        outputs.check_table(Path("c.parquet"))
