"""A package of one's own in place of the one that the tests run from."""

from __future__ import annotations

from pathlib import Path

SITE = """import sys
sys.meta_path[:] = [each for each in sys.meta_path if not getattr(each, "__module__", "").startswith("__editable__")]
"""


def hide_editable(folder: Path) -> Path:
    """Keep an editable installation from adding what the package in `folder`, which belongs on PYTHONPATH, lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    return folder
