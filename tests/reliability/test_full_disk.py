"""Real trainings on a small file system that fills up after a few steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from disks import fill, small_disk
from runs import STEPS_PER_EPOCH, Run, assert_equal, final_state, timeless

from iic_dist.config.build import RunData
from iic_dist.config.command_line import parse
from iic_dist.data.image_set import ImageSet
from iic_dist.distributed import Place
from iic_dist.errors import RunError
from iic_dist.losses.step import Terms
from iic_dist.training import checkpoint
from iic_dist.training.schedule import Pass
from iic_dist.training.trainer import Trainer

EPOCHS = 4
OPTIONS = ["--train.epochs", str(EPOCHS)]
SAID_ONCE = ("lines are missing in metrics.jsonl, training goes on", "nothing more goes to TensorBoard")


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


class Filling(Trainer):
    """A trainer that fills a disk before each step from some step on."""

    disk: Path | None = None

    def train_step(self, each: Pass, position: int) -> Terms:
        if self.disk is not None and self.step >= 8:
            fill(self.disk)
        return super().train_step(each, position)


def small_trainer() -> Filling:
    """Twenty steps on 51 images, each of them saved."""
    options = [
        *("--data.batch_size", "12", "--train.epochs", "5", "--model.num_overclusters", "6", "--model.sub_heads", "2"),
        *(
            "--views.size",
            "8",
            "--monitor.progress",
            "false",
            "--monitor.log_every",
            "1",
            "--train.evaluate_every",
            "0",
        ),
        *("--train.checkpoint_every_steps", "1", "--run.threads", "1"),
    ]
    pixels = torch.randint(0, 256, (51, 1, 8, 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    images = ImageSet("digits", pixels, torch.arange(51) % 4, tuple("abcd"))
    return Filling(parse(options), RunData(images, images), Place(), torch.device("cpu"))


def test_a_full_disk_is_no_end_and_what_is_lost_comes_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In this process; the tests below do it with real ones."""
    with small_disk(tmp_path / "runs", 24) as disk:
        trainer = small_trainer()
        trainer.disk = disk
        with caplog.at_level("WARNING"), pytest.raises(RunError, match="the state after step 20 could not be saved"):
            trainer.train(disk / "r")
        assert trainer.step == 20
        assert [sum(said in line for line in caplog.messages) for said in SAID_ONCE] == [1, 1]
        assert sum("no checkpoint of step" in line for line in caplog.messages) >= 12
        again = small_trainer()
        assert again.resume(disk / "r")
        assert 8 <= again.step < 20
        (disk / "ballast").unlink()
        assert again.train(disk / "r") is not None
        assert (disk / "r" / "result.json").exists()
    undisturbed = small_trainer()
    undisturbed.train(tmp_path / "undisturbed")
    assert_equal(timeless(again.state_dict()), timeless(undisturbed.state_dict()))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_stop_that_cannot_be_saved_is_a_failure_without_the_marker(tmp_path: Path, disk: Path) -> None:
    with Run(tmp_path, "--train.epochs", "500", ranks=0) as run:
        fill_up(run, disk)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 1, run.output
    assert run.output.splitlines()[-1].startswith("error: the state after step ")
    assert run.preempted() is None
    assert_intact(run, 3)
