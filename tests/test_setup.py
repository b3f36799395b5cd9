"""What setup.py chooses to build on which machine, by the one line that it prints; and installations of that."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packages import hide_editable

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
LOOKED_AT = ("IIC_DIST_BUILD", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
"""What the choice depends on besides PATH."""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
needs_nvcc = pytest.mark.skipif(
    NVCC is None or torch.version.cuda is None, reason=f"nvcc {NVCC}, torch for CUDA {torch.version.cuda}: needs both"
)


def run_setup(environment: dict[str, str], program: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `setup.py --name`, or a program in its place, with nothing set that its choice looks at but `environment`."""
    kept = {name: value for name, value in os.environ.items() if name not in LOOKED_AT}
    command = [sys.executable, "setup.py"] if program is None else [sys.executable, "-c", program]
    return subprocess.run(
        [*command, "--name"], cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=60
    )


def choice(environment: dict[str, str], program: str | None = None) -> str:
    """The line about the extension, of which there must be one."""
    run = run_setup(environment, program)
    assert run.returncode == 0, run.stderr
    [line] = [line for line in run.stdout.splitlines() if line.startswith("iic_dist extension: ")]
    assert run.stdout.splitlines()[-1] == "iic_dist"
    return line.removeprefix("iic_dist extension: ")


@pytest.fixture
def setup_file() -> ModuleType:
    """setup.py, not run."""
    spec = importlib.util.spec_from_file_location("setup_file", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return path


def fake_toolkit(folder: Path, headers: bool = True) -> Path:
    """A toolkit whose nvcc says where it lies, as the real one does."""
    script(folder / "bin" / "nvcc", f'echo "#$ TOP={folder}/bin/.." >&2')
    (folder / "include").mkdir()
    if headers:
        (folder / "include" / "cuda_runtime.h").touch()
    return folder


def test_none_is_none() -> None:
    assert choice({"IIC_DIST_BUILD": "none"}) == "none (IIC_DIST_BUILD=none)"


@needs_compiler
def test_cpu_is_cpu_wherever_nvcc_is() -> None:
    assert choice({"IIC_DIST_BUILD": "cpu"}) == "cpu (IIC_DIST_BUILD=cpu)"


def test_another_word_is_one_line() -> None:
    run = run_setup({"IIC_DIST_BUILD": "gpu"})
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == "IIC_DIST_BUILD='gpu': must be auto, cuda, cpu or none\n"


def test_without_any_compiler_nothing_is_built(tmp_path: Path) -> None:
    assert choice({"PATH": str(tmp_path)}) == "none (no C++ compiler (c++))"


def test_the_compiler_of_the_environment_is_asked_for() -> None:
    run = run_setup({"CXX": "/nowhere/c++ -O1", "IIC_DIST_BUILD": "cpu"})
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "IIC_DIST_BUILD=cpu: no C++ compiler (/nowhere/c++ -O1)"


def test_a_compiler_may_be_a_command_with_arguments(
    setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", f"{script(tmp_path / 'ccache')} g++")
    assert "C++" not in str(setup_file.why_no_compiler())


def only_programs(folder: Path, *names: str) -> Path:
    """A folder for PATH with these programs alone, as far as this machine has them."""
    folder.mkdir()
    for found in filter(None, map(shutil.which, names)):
        (folder / Path(found).name).symlink_to(found)
    return folder


@needs_compiler
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA, which is then the reason")
def test_without_nvcc_it_is_cpu(tmp_path: Path) -> None:
    """Neither on PATH, nor by CUDA_HOME, nor in the usual place, which this machine may have."""
    program = (
        "import pathlib, sys; sys.argv[0] = 'setup.py'\n"
        "code = pathlib.Path('setup.py').read_text()\n"
        "assert code.count('/usr/local/cuda/bin') == 1\n"
        "exec(compile(code.replace('/usr/local/cuda/bin', '/nowhere'), 'setup.py', 'exec'))"
    )
    path = only_programs(tmp_path / "path", "c++", "g++", "gcc", "cc")
    assert choice({"PATH": str(path)}, program) == "cpu (no nvcc with its headers)"


def doctor_of_an_installation(folder: Path, path: Path) -> str:
    """Install this tree with only the programs of `path`, no nvcc in the usual place, and return what doctor says."""
    tree, target = folder / "tree", hide_editable(folder / "installed")
    for name in ("iic_dist", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "setup.py").write_text((ROOT / "setup.py").read_text().replace("/usr/local/cuda/bin", "/nowhere"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    kept = {name: value for name, value in os.environ.items() if name not in LOOKED_AT}
    environment = {**kept, "PATH": str(path), "PYTHONPATH": str(target)}
    commands = [[*pip, "--target", str(target), str(tree)], [sys.executable, "-m", "iic_dist.doctor"]]
    for command in commands:
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_an_installation_without_a_compiler_works(tmp_path: Path) -> None:
    said = doctor_of_an_installation(tmp_path, only_programs(tmp_path / "path"))
    assert "extension    not used: the extension iic_dist._C could not be loaded" in said
    assert "IIC in PyTorch, NT-Xent in PyTorch, views in PyTorch" in said
    assert "training would work" in said


@pytest.mark.slow
@needs_compiler
def test_an_installation_without_nvcc_has_the_ops_of_the_cpu(tmp_path: Path) -> None:
    programs = only_programs(tmp_path / "path", "c++", "g++", "gcc", "cc", "as", "ld", "ninja", "uname")
    said = doctor_of_an_installation(tmp_path, programs)
    assert f"extension    {tmp_path}/installed/iic_dist/_C" in said
    assert "no CUDA" in said
    assert "IIC fused, NT-Xent fused, views fused" in said
    assert "training would work" in said


def test_a_cuda_home_without_a_toolkit_is_not_passed_over(setup_file: ModuleType, tmp_path: Path) -> None:
    """Another toolkit than the one that was asked for would be a surprise."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert setup_file.cuda_toolkit() is None


@pytest.fixture
def places(setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is all of PATH, with no other way to a toolkit."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup_file, "USUAL_PLACE", str(tmp_path / "usual" / "bin"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    (tmp_path / "path").mkdir()
    return tmp_path


def test_the_toolkit_of_an_nvcc_anywhere(setup_file: ModuleType, places: Path) -> None:
    assert setup_file.cuda_toolkit() is None
    usual = fake_toolkit(places / "usual")
    assert setup_file.cuda_toolkit() == usual
    linked = fake_toolkit(places / "linked")
    nvcc = places / "path" / "nvcc"
    nvcc.symlink_to(linked / "bin" / "nvcc")
    assert setup_file.cuda_toolkit() == linked
    nvcc.unlink()
    wrapped = fake_toolkit(places / "wrapped")
    script(nvcc, f'exec {wrapped}/bin/nvcc "$@"')
    assert setup_file.cuda_toolkit() == wrapped


def test_a_toolkit_without_headers_is_none(setup_file: ModuleType, places: Path) -> None:
    fake_toolkit(places / "usual", headers=False)
    assert setup_file.cuda_toolkit() is None


@needs_compiler
@needs_nvcc
@pytest.mark.parametrize("how", ["symbolic link", "wrapper script"])
def test_nvcc_is_found_through_a(how: str, tmp_path: Path) -> None:
    assert NVCC is not None
    if how == "symbolic link":
        (tmp_path / "nvcc").symlink_to(os.path.realpath(NVCC))
    else:
        script(tmp_path / "nvcc", f'exec {NVCC} "$@"')
    line = choice({"PATH": f"{tmp_path}:{os.environ['PATH']}", "IIC_DIST_BUILD": "auto"})
    found = re.fullmatch(r"cuda \(toolkit (.+)\)", line)
    assert found, line
    assert Path(found[1]) != tmp_path.parent
    assert (Path(found[1]) / "bin" / "nvcc").exists()
    assert (Path(found[1]) / "include" / "cuda_runtime.h").exists()
