"""A wheel and an sdist, built here and installed into environments that have nothing of ours.

An environment of these tests is empty but for torch and the other packages that ours needs, which it finds where this
interpreter has them: they are not installed again. Nothing is fetched. With a compiler one op is compiled, without
optimisation; the slow tests of test_setup.py compile all of them. All of this takes 95 seconds of one core.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("PYTHONPATH", "IIC_DIST_BUILD", "CXX", "CUDA_HOME", "CUDA_PATH")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command without what points to this tree; return what it says, or fail with it."""
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env={**kept, "OMP_NUM_THREADS": "1", **variables}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of this tree, made where there is no compiler, as on most machines that publish one."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in ("iic_dist", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    program = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", program, cwd=folder, IIC_DIST_BUILD="none")
    [made] = (folder / "dist").iterdir()
    return made


def empty_environment(folder: Path) -> Path:
    """Make an environment with the packages of this interpreter and none of ours; return its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A folder that is named so is searched, but the .pth files in it, such as an editable installation's, are not read.
    Path(own, "torch-and-others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    missing = subprocess.run([python, "-c", "import iic_dist"], cwd=folder, env={}, capture_output=True, text=True)
    assert "No module named 'iic_dist'" in missing.stderr
    return python


def built_wheel(source: Path, folder: Path, **variables: str) -> Path:
    """Build a wheel of an sdist, or of a folder, as pip does."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", folder, source, cwd=folder.parent, **variables)
    [made] = folder.glob("iic_dist-*.whl")
    return made


def install(wheel: Path, python: Path) -> None:
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    run(*pip, wheel, cwd=python.parent)
    where = run(python, "-c", "import iic_dist; print(iic_dist.__file__)", cwd=python.parent)
    assert where.startswith(str(python.parents[1])), where


def test_the_sdist_has_all_that_is_compiled_and_all_that_is_read(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.check_output(["git", "ls-files", "csrc", "iic_dist"], cwd=ROOT, text=True).splitlines()
    assert len(tracked) > 100
    assert set(tracked) - names == set()
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_a_wheel_without_a_compiler_runs_every_command(sdist: Path, tmp_path: Path) -> None:
    """From presets to pages, and on two ranks; a wheel for any platform, since nothing in it is compiled."""
    nothing = tmp_path / "no-programs"
    nothing.mkdir()
    wheel = built_wheel(sdist, tmp_path / "wheels", PATH=str(nothing))
    assert wheel.name.endswith("-py3-none-any.whl")
    python = empty_environment(tmp_path / "environment")
    install(wheel, python)
    place = tmp_path / "place"
    place.mkdir()
    said = run(python, "-m", "iic_dist.doctor", cwd=place)
    assert "IIC in PyTorch, NT-Xent in PyTorch, views in PyTorch" in said
    assert "training would work" in said
    (place / "images").mkdir()
    for number in range(3):
        Image.effect_noise((8, 8), 40 + 20 * number).save(place / "images" / f"{number}.png")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    options = ["--train.epochs", "1", "--data.batch_size", "896", "--monitor.progress", "false"]
    run(python, *torchrun, "iic_dist.train", "--config", "digits", "--run.name", "r", *options, cwd=place)
    run(python, "-m", "iic_dist.evaluate", "--run", "runs/r", cwd=place)
    pages = ["--images", "images", "--output", "clusters.csv", "--gallery", "gallery.html"]
    run(python, "-m", "iic_dist.predict", "--run", "runs/r", *pages, cwd=place)
    assert "<html" in (place / "gallery.html").read_text()
    assert run(python, "-m", "iic_dist.doctor", "--run", "runs/r", cwd=place).count("ended") >= 2
    for command in ("choose", "export"):
        assert "usage:" in run(python, "-m", f"iic_dist.{command}", "--help", cwd=place)


@needs_compiler
def test_a_wheel_with_a_compiler_has_the_compiled_ops(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.glob("iic_dist-*")
    for other in (*source.glob("csrc/cpu/augment*.cpp"), *source.glob("csrc/cpu/nt_xent*.cpp")):
        other.unlink()
    setup = source / "setup.py"
    assert setup.read_text().count('"-O3", "-std=c++20", "-Wall"') == 1
    setup.write_text(setup.read_text().replace('"-O3", "-std=c++20", "-Wall"', '"-O0", "-std=c++20"'))
    wheel = built_wheel(source, tmp_path / "wheels", IIC_DIST_BUILD="cpu", CFLAGS="-O0 -g0")
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.startswith("iic_dist/_C.")]
    python = empty_environment(tmp_path / "environment")
    install(wheel, python)
    said = run(python, "-m", "iic_dist.doctor", cwd=tmp_path)
    assert f"extension    {tmp_path}/environment/" in said
    assert "IIC fused, NT-Xent in PyTorch, views in PyTorch" in said
    assert "training would work" in said
