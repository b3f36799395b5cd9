"""What the tests of launch/ have in common: one small training, its processes, and its weights when nothing happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
EPOCHS, STEPS = 20, 80

# One thread a rank whatever the machine: more would add in another order.
SMALL = [
    *("--data.batch_size", "448", "--train.epochs", str(EPOCHS), "--train.checkpoint_every", "2", "--run.threads", "1"),
    *("--model.sub_heads", "2", "--train.evaluate_every", "0", "--monitor.log_every", "1"),
    *("--monitor.progress", "false", "--monitor.kmeans", "false", "--run.device", "cpu"),
]


def environment(**variables: str) -> dict[str, str]:
    """The tests' own interpreter and this tree's package, for scripts that run in another folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path, **variables}


def start(*command: str | Path, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a script in a session of its own; its output goes to a file of its number in `cwd`."""
    log = cwd / f"output-{len(list(cwd.glob('output-*')))}.txt"
    with log.open("w") as file:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=environment(**variables),
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def output(cwd: Path) -> str:
    """The end of what every started script has said."""
    return "\n".join(f"== {path.name}\n{path.read_text()[-6000:]}" for path in sorted(cwd.glob("output-*")))


def wait_until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Wait for a condition, looking ten times a second; fail with `what()` when the time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing after {seconds} s: {what()}"
        time.sleep(0.1)


def steps_done(folder: Path) -> int:
    """How many steps a run has logged."""
    log = folder / "metrics.jsonl"
    return log.read_text().count("loss/clustering") if log.exists() else 0


def children(process: int) -> list[int]:
    """The processes that this one started and that still run."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def descendants(process: int) -> list[int]:
    found = children(process)
    return found + [each for child in found for each in descendants(child)]


def kill(processes: Sequence[int]) -> None:
    """End processes as a lost machine would: at once, without a word."""
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def end(process: subprocess.Popen[str]) -> None:
    """Leave nothing behind of a started script."""
    kill([process.pid, *descendants(process.pid)])
    process.wait()


def weights(folder: Path) -> dict[str, Tensor]:
    """What the newest checkpoint of a run holds of the network."""
    newest = max((folder / "checkpoints").glob("*.pt"), key=lambda path: path.name)
    state: dict[str, Tensor] = torch.load(newest, weights_only=True)["model"]
    return state


def assert_same_weights(folder: Path, wanted: Path) -> None:
    ours, theirs = weights(folder), weights(wanted)
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert different == [], different
