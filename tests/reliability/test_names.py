"""Names that break tables and terminals, and consoles that cannot show every letter; real processes, real files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ODD_NAMES, write_digits, write_odd_names

from iic_dist.training.run_folder import settings_of

UNREADABLE = (b"latin-\xe9.png", b"line\nfeed.png", b"\x1b[31mred.png", "\u202egnp.png".encode(), "ü.png".encode())
SHOWN = ["\\u202egnp.png", "\\x1b[31mred.png", "latin-\\xe9.png", "line\\nfeed.png", "ü.png"]
CONSOLES = ("utf-8:strict", "ascii:strict")
SMALL = ["--model.num_clusters", "3", "--train.epochs", "1", "--model.sub_heads", "2", "--monitor.progress", "false"]


def run(*arguments: str | bytes | Path, cwd: Path, console: str) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m ARGUMENTS` with an output of some encoding and its way with other letters."""
    environment = {**os.environ, "PYTHONIOENCODING": console, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, timeout=300, capture_output=True)


@pytest.mark.parametrize("console", CONSOLES)
def test_predict_names_files_of_any_name(console: str, gray_run: Path, tmp_path: Path) -> None:
    """An unreadable file whose name was not UTF-8 ended predict after all the work, and ESC went to the terminal."""
    images = tmp_path / "images"
    images.mkdir()
    write_odd_names(images)
    for name in UNREADABLE:
        with open(bytes(images) + b"/bad " + name, "wb") as file:
            file.write(b"no image")
    arguments = (
        "iic_dist.predict",
        "--run",
        gray_run,
        "--images",
        images,
        "--output",
        b"out-\xe9.csv",
        "--no-progress",
    )
    done = run(*arguments, cwd=tmp_path, console=console)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode(console.split(":")[0])
    assert all(line.isprintable() for line in said.splitlines())
    assert f"{len(ODD_NAMES)} images in" in said
    shown = said if console.startswith("utf-8") else said.replace("\\xfc", "ü")
    named = [line.split(": ")[0] for line in shown.splitlines() if ": not an image" in line]
    assert sorted(named) == [f"  bad {name}" for name in SHOWN]
    assert "written: out-\\xe9.csv" in said
    with open(bytes(tmp_path) + b"/out-\xe9.csv.unreadable.txt", encoding="utf-8") as file:
        assert sorted(line.split("\t")[0] for line in file.read().splitlines()) == [f"bad {name}" for name in SHOWN]


def test_a_training_on_a_folder_of_any_name_ends_well_on_a_console_of_ascii(tmp_path: Path) -> None:
    """The ± of a summary ended it, and nothing could read the config.yaml of a folder whose name is not UTF-8."""
    images = tmp_path / os.fsdecode(b"ph\x1b[31m\xe9")
    images.mkdir()
    write_digits(images, 60)
    with open(bytes(images) + b"/\xe9.png", "wb") as file:
        file.write(b"no image")
    options = ["--data.name", f"folder:{images.name}", "--data.folder_labels", "true", "--run.name", "r", *SMALL]
    done = run("iic_dist.train", *options, cwd=tmp_path, console="ascii:strict")
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode("ascii")
    assert all(line.isprintable() for line in said.splitlines())
    assert "folder:ph\\x1b[31m\\xe9: 60 images" in said
    assert "\\xb1" in said
    assert "1 unreadable file, named in runs/r/unreadable.txt" in said
    assert (tmp_path / "runs" / "r" / "unreadable.txt").read_text("utf-8").startswith("\\xe9.png\tnot an image")
    assert settings_of(tmp_path / "runs" / "r").data.name == f"folder:{images.name}"
    again = run("iic_dist.evaluate", "--run", "runs/r", cwd=tmp_path, console="ascii:strict")
    assert "folder:ph\\x1b[31m\\xe9: 60 images" in again.stdout.decode("ascii"), again.stderr


@pytest.mark.parametrize("console", CONSOLES)
def test_an_error_is_one_line_whatever_it_names(console: str, tmp_path: Path) -> None:
    done = run("iic_dist.evaluate", "--run", b"no\nrun-\xe9\x1b[31m", cwd=tmp_path, console=console)
    assert done.returncode == 2
    said = done.stderr.decode(console.split(":")[0])
    assert said.startswith("error: no\\nrun-\\xe9\\x1b[31m: not a run")
    assert said.count("\n") == 1
