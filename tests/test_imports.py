"""Imports point down: commands -> rooms -> ops and distributed -> errors and files; each rule also sees a violation."""

from __future__ import annotations

import ast
import graphlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import iic_dist

PACKAGE = Path(iic_dist.__file__).parent

FLOORS = (
    {"errors", "files", "wording"},
    {"distributed", "ops"},
    {"device", "failure"},
    {"data", "views", "models", "losses"},  # know nothing of each other
    {"config", "evaluation"},  # nor do these, so that only what is above config sees a Config
    {"training"},
    {"prediction"},  # reads what training leaves
    {"train", "evaluate", "choose", "predict", "export", "doctor", "__init__"},  # no command opens onto another
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
EMPTY_FACES = {"ops", "data", "views", "evaluation", "training", "prediction"}
FACES = {"losses", "models", "config"}
"""Rooms whose `__init__` hands names on; nothing else."""

Imports = dict[str, set[str]]
"""Of each file, by its path without ending, such as "losses/iic": the files of ours that it imports."""


def room(file: str) -> str:
    return file.split("/")[0]


def read_imports(package: Path) -> Imports:
    """Read the imports of all files, those in functions and for type checkers too."""
    paths = {path.relative_to(package).with_suffix("").as_posix(): path for path in package.rglob("*.py")}
    return {
        file: {found for name in imported_names(path, file) if (found := file_of(name, set(paths)))}
        for file, path in paths.items()
    }


def imported_names(path: Path, file: str) -> set[str]:
    """List the dotted names that a file imports; for `from a import b` that is a.b, be it a module or a name in a."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = ["iic_dist", *file.split("/")]
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def file_of(name: str, files: set[str]) -> str | None:
    """Find the file of a dotted name; None for other packages, and for the version, which is there before all else."""
    package, *parts = name.split(".")
    if package != "iic_dist" or parts[:1] == ["__version__"]:
        return None
    while parts:
        for file in ("/".join(parts), "/".join([*parts, "__init__"])):
            if file in files:
                return file
        parts.pop()  # a name in a module
    return "__init__"


def higher_or_beside(package: Path) -> list[str]:
    """List the imports from a higher floor, and from another room of the same floor."""
    return [
        f"{file} imports {other}"
        for file, others in read_imports(package).items()
        for other in others
        if room(other) != room(file) and FLOOR[room(other)] >= FLOOR[room(file)]
    ]


def ours_in_ops(package: Path) -> list[str]:
    """List what `ops` imports of other rooms."""
    own = {file: others for file, others in read_imports(package).items() if room(file) == "ops"}
    return [f"{file} imports {other}" for file, others in own.items() for other in others if room(other) != "ops"]


def circles_in_a_room(package: Path) -> list[str]:
    """Name a circle of imports inside each room that has one."""
    imports, circles = read_imports(package), []
    for name in sorted(set(map(room, imports))):
        files = {file for file in imports if room(file) == name}
        try:
            graphlib.TopologicalSorter({file: imports[file] & files for file in files}).prepare()
        except graphlib.CycleError as error:
            circles.append(" -> ".join(error.args[1]))
    return circles


def names_without_floor(package: Path) -> list[str]:
    """List the names right under the package that stand on no floor, and those of a floor that are not there."""
    names = {path.name.removesuffix(".py") for path in package.iterdir() if path.is_dir() or path.suffix == ".py"}
    return sorted((names - {"__pycache__"}) ^ set(FLOOR))


def faces_that_do_more(package: Path) -> list[str]:
    """List the rooms whose `__init__` holds more than a docstring, or more than imports and `__all__`."""
    wrong = []
    for name in EMPTY_FACES | FACES:
        docstring, *rest = ast.parse((package / name / "__init__.py").read_text()).body
        allowed = () if name in EMPTY_FACES else (ast.ImportFrom, ast.Assign)
        documented = isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
        if not documented or not all(isinstance(node, allowed) for node in rest):
            wrong.append(name)
    return sorted(wrong)


RULES = [higher_or_beside, ours_in_ops, circles_in_a_room, names_without_floor, faces_that_do_more]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_stands(rule: Callable[[Path], list[str]]) -> None:
    assert rule(PACKAGE) == []


@pytest.mark.parametrize(
    ("rule", "file", "line", "seen"),
    [
        (higher_or_beside, "data/load.py", "from iic_dist.config import Config", "data/load imports config/__init__"),
        (higher_or_beside, "views/views.py", "import iic_dist.data.load", "views/views imports data/load"),
        (higher_or_beside, "evaluation/metrics.py", "from ..config import check", "metrics imports config/check"),
        (higher_or_beside, "choose.py", "def f():\n    from iic_dist import train", "choose imports train"),
        (higher_or_beside, "predict.py", "from iic_dist import load", "predict imports __init__"),
        (ours_in_ops, "ops/iic.py", "from iic_dist.errors import UsageError", "ops/iic imports errors"),
        (circles_in_a_room, "losses/iic.py", "from . import step", "losses"),
        (names_without_floor, "utils.py", "", "utils"),
        (names_without_floor, "dreams/nothing.txt", "", "dreams"),
        (faces_that_do_more, "data/__init__.py", "from iic_dist.data.load import load_image_set", "data"),
        (faces_that_do_more, "models/__init__.py", "print()", "models"),
    ],
)
def test_a_rule_sees_what_breaks_it(
    rule: Callable[[Path], list[str]], file: str, line: str, seen: str, tmp_path: Path
) -> None:
    package = tmp_path / "iic_dist"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    changed = package / file
    changed.parent.mkdir(exist_ok=True)
    changed.write_text((changed.read_text() if changed.exists() else "") + f"\n{line}\n")
    [violation] = rule(package)
    assert seen in violation


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import iic_dist", {"torch"}),
        ("import iic_dist.views.views, iic_dist.losses", {"PIL", "sklearn", "torchvision", "yaml"}),
    ],
)
def test_an_import_loads_no_more_than_it_needs(statement: str, unwanted: set[str]) -> None:
    """Benchmarks of views and losses run on GPU machines that have torch alone."""
    program = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    loaded = set(ran.stdout.split())
    assert "iic_dist" in loaded
    assert not loaded & unwanted
