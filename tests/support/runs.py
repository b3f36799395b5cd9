"""Small trainings under torchrun in real processes, which can be killed, stopped and looked at from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from iic_dist.training import checkpoint


def children(pid: int) -> list[int]:
    """The processes that one has started and that are there."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


SMALL = [
    *("--data.batch_size", "256", "--model.sub_heads", "2", "--run.threads", "1", "--run.name", "r"),
    *("--monitor.progress", "false", "--monitor.log_every", "1", "--monitor.kmeans", "false"),
    *("--train.evaluate_every", "0", "--train.checkpoint_every_steps", "1"),
]
STEPS_PER_EPOCH = 1797 // 256


class Run:
    """A training under torchrun; it is gone when the `with` block ends, however it ends.

    Args:
        cwd: Where `runs/r` is made.
        options: Of iic_dist.train, after those of `SMALL`.
        ranks: Number of workers; 0 = one process without torchrun.
        restarts: How often torchrun may start them again.
    """

    def __init__(self, cwd: Path, *options: str, ranks: int = 2, restarts: int = 0) -> None:
        self.folder = cwd / "runs" / "r"
        self._under_torchrun = ranks > 0
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launcher = [*torchrun, f"--max-restarts={restarts}"] if ranks else []
        self._output = cwd / "output.txt"
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "iic_dist.train", *SMALL, *options],
                cwd=cwd,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in (*self.workers(), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def workers(self) -> list[int]:
        """The processes of the ranks that run now."""
        started = children(self.process.pid)
        return [pid for pid in started if b"iic_dist.train" in command_line(pid)]

    def decoders(self) -> list[int]:
        """The processes that decode images for the ranks now."""
        ranks = self.workers() if self._under_torchrun else [self.process.pid]
        return [child for rank in ranks for child in children(rank)]

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for text in (self.folder / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    lines.append(json.loads(text))
        return lines

    def step(self) -> int:
        """The newest step that is logged."""
        return max((line["step"] for line in self.lines()), default=0)

    def wait_for(self, step: int, seconds: float = 240) -> None:
        """Wait until a step is logged or the run has ended."""
        until = time.monotonic() + seconds
        while self.step() < step and self.process.poll() is None:
            assert time.monotonic() < until, f"step {step} was not reached:\n{self.output}"
            time.sleep(0.01)

    def end(self, seconds: float = 400) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(timeout=seconds)

    def preempted(self) -> dict[str, Any] | None:
        """What the file PREEMPTED says, if it is there."""
        path = self.folder / "PREEMPTED"
        return json.loads(path.read_text()) if path.exists() else None


def timeless(state: dict[str, Any]) -> dict[str, Any]:
    """A state without what differs from one machine's minute to the next."""
    figures = {stage: {**of, "seconds": None} for stage, of in state["stage_figures"].items()}
    return {**state, "train_seconds": None, "stage_figures": figures}


def final_state(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a run, without its seconds."""
    state = checkpoint.load_newest(folder / "checkpoints")
    assert state is not None
    return timeless(state)


def assert_equal(one: Any, other: Any, where: str = "state") -> None:
    """Two states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_equal(mine, theirs, f"{where}[{place}]")
    else:
        assert one == other, where
