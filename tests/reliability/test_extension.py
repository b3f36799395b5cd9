"""Two ranks whose extension is absent, broken or built for another torch train alike, after one warning."""

from __future__ import annotations

import shutil
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from packages import hide_editable
from runs import Run

import iic_dist
from iic_dist.ops import backend

OTHER_TORCH = 'def build_info():\n    return {"torch": "2.0.1", "cuda": None, "cpu_capability": "AVX2"}\n'
EXTENSIONS = {
    "absent": (None, b"", "No module named 'iic_dist._C'"),
    "broken": (f"_C{EXTENSION_SUFFIXES[0]}", b"not a library", "could not be loaded"),
    "for another torch": ("_C.py", OTHER_TORCH.encode(), "was built for torch 2.0.1, not "),
}
WARNING = "losses and views run in PyTorch: "


def package_with(folder: Path, name: str | None, content: bytes) -> Path:
    """Copy the package without its extension, put something else there, and return what belongs on the path."""
    package = hide_editable(folder / "path") / "iic_dist"
    shutil.copytree(str(iic_dist.__path__[0]), package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    if name is not None:
        (package / name).write_bytes(content)
    return package.parent


def losses(run: Run) -> list[dict[str, float]]:
    """The losses of each step, to the end of a run of one epoch."""
    with run:
        assert run.end() == 0, run.output
    return [{name: line[name] for name in line if name.startswith("loss/")} for line in run.lines() if "epoch" in line]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The losses with the extension that this installation has."""
    if backend.WHY_NOT_FUSED is not None:
        pytest.skip(backend.WHY_NOT_FUSED)
    run = Run(tmp_path_factory.mktemp("good"), "--train.epochs", "1")
    good = losses(run)
    assert "IIC fused" in run.output
    assert WARNING not in run.output
    return good


@pytest.mark.slow
@pytest.mark.parametrize(("name", "content", "why"), EXTENSIONS.values(), ids=EXTENSIONS)
def test_the_losses_are_the_same_after_one_warning(
    name: str | None,
    content: bytes,
    why: str,
    tmp_path: Path,
    expected: list[dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(package_with(tmp_path, name, content)))
    run = Run(tmp_path, "--train.epochs", "1")
    found = losses(run)
    [said] = [line for line in run.output.splitlines() if WARNING in line]
    assert why in said
    assert run.output.count(why) == 1
    assert "IIC in PyTorch, NT-Xent in PyTorch" in run.output
    assert len(found) == len(expected) == 7
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        # The first step shows the losses of the same weights; later ones rounding, which training amplifies.
        assert mine == pytest.approx(theirs, abs=2e-5 if step == 0 else 1e-2), f"step {step + 1}"
