"""Dependencies point one way: commands -> trainer -> rooms -> ops and distributed -> torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import iic_dist

PACKAGE = Path(iic_dist.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

COMMANDS = {"train", "evaluate", "choose", "predict", "export", "doctor"}
SEES_CONFIG = COMMANDS | {"command_line", "build", "trainer", "config", "clusterer", "folder_settings"}
LEVEL = {
    **dict.fromkeys(("errors", "config"), 0),
    **dict.fromkeys(("ops", "distributed", "philox", "exact", "files", "stop", "objective"), 1),
    **dict.fromkeys(
        ("view_spec", "guard", "data", "models", "losses", "optim", "checkpoint", "metrics", "command_line"), 2
    ),
    **dict.fromkeys(
        ("restart", "augment", "schedule", "health", "selection", "stuck", "step_losses", "folder_settings"), 3
    ),
    "figures": 4,
    **dict.fromkeys(("monitor", "inference"), 5),
    **dict.fromkeys(("report", "build"), 6),
    **dict.fromkeys(("evaluation", "clusterer"), 7),
    **dict.fromkeys(("trainer", "folder_prediction"), 8),
    **dict.fromkeys(("prediction_files", "gallery", "export", "__init__", "doctor", "train"), 9),
    **dict.fromkeys(("evaluate", "predict"), 10),
    "choose": 11,
}


def room(path: Path) -> str:
    """The module or folder right under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "iic_dist":
            names |= {f"iic_dist.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    rooms = {name.split(".")[1] for name in names if name.startswith("iic_dist.")}
    return {name for name in rooms if not name.startswith("__")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_below_it(path: Path) -> None:
    own = room(path)
    others = imported_rooms(path) - {own}
    too_high = {other for other in others if LEVEL[other] >= LEVEL[own]}
    assert not too_high
    assert "config" not in others or own in SEES_CONFIG


def test_every_module_has_its_level() -> None:
    assert {room(path) for path in FILES} == set(LEVEL)
