"""Real trainings on a small file system that fills up after a few steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import fill, small_disk
from runs import STEPS_PER_EPOCH, Run, assert_equal, final_state

from iic_dist import checkpoint

EPOCHS = 4
OPTIONS = ["--train.epochs", str(EPOCHS)]
SAID_ONCE = ("lines are missing in metrics.jsonl, training goes on", "nothing more goes to TensorBoard")

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Where the runs of `Run(tmp_path)` lie."""
    with small_disk(tmp_path / "runs", 24) as folder:
        yield folder


def fill_up(run: Run, disk: Path) -> Path:
    """Fill the disk after some steps, and wait until all that writes has found out; return what fills it."""
    run.wait_for(4)
    ended = time.monotonic() + 240
    while not all(said in run.output for said in (*SAID_ONCE, "no checkpoint of step")):
        ballast = fill(disk)  # again, because a save that was under way has made room by removing an old one
        assert run.process.poll() is None, run.output
        assert time.monotonic() < ended, run.output
        time.sleep(0.05)
    return ballast


def assert_intact(run: Run, newest_before: int) -> None:
    """Nothing has been said twice, and the newest checkpoint is whole."""
    assert [run.output.count(said) for said in SAID_ONCE] == [1, 1], run.output
    assert "Traceback" not in run.output
    state = checkpoint.load_newest(run.folder / "checkpoints")
    assert state is not None
    assert state["step"] >= newest_before
    assert not list(run.folder.rglob("*.tmp"))


def test_training_goes_on_to_the_end_and_the_same_command_finishes_when_there_is_room(
    tmp_path: Path, disk: Path
) -> None:
    with Run(tmp_path, *OPTIONS, ranks=0) as run:
        ballast = fill_up(run, disk)
        assert run.end() == 1, run.output
    last = EPOCHS * STEPS_PER_EPOCH
    assert run.output.splitlines()[-1] == (
        f"error: the state after step {last} could not be saved: make room, and the same command goes on from "
        "the newest checkpoint"
    )
    assert_intact(run, 3)
    assert not (run.folder / "result.json").exists()
    ballast.unlink()
    with Run(tmp_path, *OPTIONS, ranks=0) as run:
        assert run.end() == 0, run.output
    assert "going on after epoch" in run.output
    assert (run.folder / "result.json").exists()
    (tmp_path / "undisturbed").mkdir()
    with Run(tmp_path / "undisturbed", *OPTIONS, ranks=0) as undisturbed:
        assert undisturbed.end() == 0, undisturbed.output
    assert_equal(final_state(run.folder), final_state(undisturbed.folder))


def test_where_room_comes_back_the_run_ends_as_if_nothing_had_been(tmp_path: Path, disk: Path) -> None:
    with Run(tmp_path, "--train.epochs", "8", restarts=0) as run:
        fill_up(run, disk).unlink()
        assert run.end() == 0, run.output
    assert_intact(run, 8 * STEPS_PER_EPOCH)
    assert (run.folder / "result.json").exists()
    steps = [line["step"] for line in run.lines()]
    assert len(steps) == len((run.folder / "metrics.jsonl").read_text().splitlines())  # every line is whole
    assert steps[-1] == 8 * STEPS_PER_EPOCH
    assert set(range(1, 8 * STEPS_PER_EPOCH)) - set(steps)  # what was logged while there was no room


def test_a_stop_that_cannot_be_saved_is_a_failure_without_the_marker(tmp_path: Path, disk: Path) -> None:
    with Run(tmp_path, "--train.epochs", "500", ranks=0) as run:
        fill_up(run, disk)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 1, run.output
    assert run.output.splitlines()[-1].startswith("error: the state after step ")
    assert run.preempted() is None
    assert_intact(run, 3)
