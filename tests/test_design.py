"""docs/design.md keeps its word: each worked example is applied to a copy of the tree, and its commands run there.

An example is a section whose blocks stand under the path of a file: `diff` changes it, another language is the whole of
a new file. Its `sh` block holds the commands, which are slow; that the changes still fit the tree is quick to see.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("iic_dist", "csrc", "tests", "benchmarks", "docs", "launch", "setup.py", "pyproject.toml", "README.md")

BLOCK = re.compile(r"^`([^`\n]+)`(?:[^\n]+\n)+\n```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
"""A paragraph that begins with a path, and the block below it."""

COMMANDS = re.compile(r"^```sh\n(.*?)^```\n", re.MULTILINE | re.DOTALL)

BUILD = "IIC_DIST_BUILD=cpu python setup.py build_ext --inplace"
QUICK_BUILD = """
from glob import glob
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension
files = ["csrc/library.cpp", "csrc/cpu/row_entropy_cpu.cpp"]
module = CppExtension("iic_dist._C", files, extra_compile_args=["-O1", "-std=c++20"])
setup(ext_modules=[module], cmdclass={"build_ext": BuildExtension}, script_args=["build_ext", "--inplace"])
"""
"""In the place of `BUILD`: the new op alone, in one minute instead of many; the others stay in PyTorch."""


@dataclass(frozen=True)
class Example:
    """A section of the page: path -> blocks of (language, content), and the commands to try it."""

    blocks: list[tuple[str, str, str]]
    commands: list[str]


def examples() -> dict[str, Example]:
    """The sections that hold blocks, by title."""
    sections = re.split(r"^## ", (ROOT / "docs/design.md").read_text(), flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        commands = [line for block in COMMANDS.findall(section) for line in block.splitlines()]
        if commands:
            found[section.splitlines()[0]] = Example(BLOCK.findall(section), commands)
    return found


EXAMPLES = examples()


def changed(text: str, diff: str) -> str:
    """Put the lines with a plus in the place of those with a minus; parts between @@ are found anywhere, once each."""
    for part in diff.split("@@\n"):
        lines = part.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(f"\n{old}") == 1, f"found {text.count(old)} times:\n{old}"
        text = text.replace(f"\n{old}", f"\n{new}")
    return text


def apply(example: Example, root: Path, written: Path) -> None:
    """Write the files of an example, made from those under `root`, below `written`."""
    for name, language, content in example.blocks:
        target = written / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if language == "diff":
            target.write_text(changed((root / name).read_text(), content))
        else:
            assert not (root / name).exists(), f"{name} is there already"
            target.write_text(content)


def test_every_block_belongs_to_a_file() -> None:
    text = (ROOT / "docs/design.md").read_text()
    assert len(EXAMPLES) == 5
    assert sum(len(example.blocks) for example in EXAMPLES.values()) == len(re.findall(r"^```(?!sh)\w+$", text, re.M))


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_fits_the_tree(title: str, tmp_path: Path) -> None:
    example = EXAMPLES[title]
    apply(example, ROOT, tmp_path)
    python = [str(tmp_path / name) for name, _, _ in example.blocks if name.endswith(".py")]
    ours = 'lint.isort.known-first-party = ["iic_dist"]'
    for check in (["check", "--config", ours], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run([*ruff, *python], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_works(title: str, tmp_path: Path) -> None:
    example, tree = EXAMPLES[title], tmp_path / "tree"
    if BUILD in example.commands and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        tree.mkdir(exist_ok=True)
        copy(ROOT / name, tree / name)
    apply(example, tree, tree)
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(program.parent), os.environ["PATH"]]),
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
    }
    for command in example.commands:
        asked = shlex.join(["python", "-c", QUICK_BUILD]) if command == BUILD else command
        if command == BUILD:
            for old in (tree / "iic_dist").glob("_C*"):
                old.unlink()
        done = subprocess.run(
            ["bash", "-c", asked], cwd=tree, env=environment, capture_output=True, text=True, timeout=580
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert " skipped" not in done.stdout.splitlines()[-1] if "pytest" in command else True, done.stdout[-500:]
