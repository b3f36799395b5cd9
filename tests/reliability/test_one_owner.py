"""Trainings in real processes that want the same folder, or must not want it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import children, end, output, start, steps_done, wait_until
from runs import SMALL, Run

ENDLESS = [*SMALL, "--train.epochs", "500"]
UNNAMED = [option for option in ENDLESS if option not in ("--run.name", "r")]


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_the_second_run_of_a_name_is_refused_and_touches_nothing(times: int, tmp_path: Path) -> None:
    """Two runs of one --run.name mixed their checkpoints, and one removed the other's temporary files."""
    draw = random.Random(4)
    command = [sys.executable, "-m", "iic_dist.train", *ENDLESS]
    unsaved = ["--train.epochs", "500", "--train.checkpoint_every_steps", "0", "--train.checkpoint_every", "500"]
    with Run(tmp_path, *unsaved, ranks=1) as run:
        run.wait_for(1)
        (run.folder / "checkpoints").mkdir()
        (run.folder / "checkpoints" / ".being-saved.pt.tmp").touch()
        (rank,) = run.workers()
        for _ in range(times):
            time.sleep(draw.random())
            before = {path.name: path.stat().st_ino for path in run.folder.rglob("*")}
            second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
            assert second.returncode == 2, second.stderr
            (line,) = [line for line in second.stderr.splitlines() if line.startswith("error:")]
            assert line.startswith(f"error: runs/r is in use: process {rank} on ")
            assert "Traceback" not in second.stderr
            assert {path.name: path.stat().st_ino for path in run.folder.rglob("*")} == before
        done = run.step()
        run.wait_for(done + 1)
        assert run.process.poll() is None, run.output


def test_a_restart_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    """A run that was killed while another of the same command ran went on in the other's folder."""
    processes = []
    try:
        for number in (1, 2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            launcher = ["-m", "torch.distributed.run", f"--master-port={port}", "--max-restarts=1"]
            processes.append(start(sys.executable, *launcher, "-m", "iic_dist.train", *UNNAMED, cwd=tmp_path))
            folder = tmp_path / "runs" / f"digits-{number}"
            wait_until(lambda folder=folder: steps_done(folder) > 2, 240, lambda: output(tmp_path))
        (killed,) = children(processes[0].pid)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: output(tmp_path).count(": 1 rank on cpu") == 3, 240, lambda: output(tmp_path))
        said = (tmp_path / "output-0.txt").read_text()
        assert "going on after epoch" in said
        assert said.count("runs/digits-1: 1 rank on cpu") == 2
        assert "digits-2" not in said
        assert {path.name for path in (tmp_path / "runs").iterdir()} == {"digits-1", "digits-2"}
    finally:
        for process in processes:
            end(process)
