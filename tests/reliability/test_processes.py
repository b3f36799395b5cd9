"""Real processes under torchrun that are killed, asked to stop, and suspended."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from runs import STEPS_PER_EPOCH, Run, assert_equal, command_line, final_state

EVALUATING = ["--train.evaluate_every", "1", "--train.evaluate_batch_size", "10"]


def undisturbed(folder: Path, *options: str) -> dict[str, object]:
    """The last state of a run that nothing happens to."""
    folder.mkdir()
    with Run(folder, *options) as run:
        assert run.end() == 0, run.output
    return final_state(run.folder)


def kill_at_random(folder: Path, kills: int, *options: str) -> Run:
    """Kill -9 a random rank at a random step, so many times in one torchrun, and let it finish."""
    draw = random.Random(1)
    with Run(folder, *options, restarts=kills) as run:
        for _ in range(kills):
            run.wait_for(run.step() + draw.randint(1, 2))
            time.sleep(draw.random() * 0.1)
            before = run.workers()
            assert before, run.output
            os.kill(draw.choice(before), signal.SIGKILL)
            while set(run.workers()) & set(before) and run.process.poll() is None:
                time.sleep(0.02)
        assert run.end() == 0, run.output
    return run


@pytest.mark.parametrize("kills", [pytest.param(1, id="once"), pytest.param(20, marks=pytest.mark.slow, id="20 times")])
def test_a_run_whose_ranks_are_killed_ends_with_the_weights_of_one_whose_are_not(kills: int, tmp_path: Path) -> None:
    options = ["--train.epochs", str(1 + kills * 3 // STEPS_PER_EPOCH)]
    run = kill_at_random(tmp_path, kills, *options)
    assert run.output.count("going on after epoch") == kills
    assert_equal(final_state(run.folder), undisturbed(tmp_path / "undisturbed", *options))


@pytest.mark.slow
@pytest.mark.parametrize("towards", ["labels", "neighbours"])
def test_a_run_that_is_killed_in_each_of_its_stages_ends_alike(towards: str, tmp_path: Path) -> None:
    """Seven steps on views, thirty on neighbours, fourteen of refinement."""
    options = [
        *("--train.epochs", "1", "--neighbours.steps", "30", "--neighbours.batch_size", "256"),
        *("--refine.epochs", "2", "--refine.towards", towards, "--refine.confidence", "0.5"),
    ]
    draw = random.Random(3)
    with Run(tmp_path, *options, restarts=4) as run:
        for step in (3, 7 + 10, 7 + 30 + 1, 7 + 30 + 9):
            run.wait_for(step)
            before = run.workers()
            assert before, run.output
            os.kill(draw.choice(before), signal.SIGKILL)
            while set(run.workers()) & set(before) and run.process.poll() is None:
                time.sleep(0.02)
        assert run.end() == 0, run.output
    assert run.output.count("going on after epoch") == 4
    assert_equal(final_state(run.folder), undisturbed(tmp_path / "undisturbed", *options))


def stop_and_go_on(folder: Path, stops: int, *options: str) -> tuple[Run, list[dict[str, object]]]:
    """Signal a random rank at random steps and in evaluations; start again each time; return what was noted."""
    draw = random.Random(2)
    notes: list[dict[str, object]] = []
    for place in range(stops):
        with Run(folder, *options) as run:
            run.wait_for(1)
            done = run.step()
            if place % 2:  # just after an epoch's last step: in the evaluation
                run.wait_for(done - done % STEPS_PER_EPOCH + STEPS_PER_EPOCH)
            else:
                run.wait_for(done + draw.randint(1, 2))
            number = draw.choice([signal.SIGTERM, signal.SIGUSR1])
            os.kill(draw.choice(run.workers()), number)
            assert run.end() == 0, run.output
            note = run.preempted()
            assert note is not None, run.output
            assert note["signal"] == number.name
            notes.append(note)
    with Run(folder, *options) as run:
        assert run.end() == 0, run.output
    assert run.preempted() is None
    return run, notes


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_ten_times_saves_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    stops = 10
    options = [*EVALUATING, "--train.epochs", str(2 + stops), "--train.checkpoint_every_steps", "0"]
    run, notes = stop_and_go_on(tmp_path, stops, *options)
    assert len(notes) == stops
    steps = [note["step"] for note in notes]
    assert steps == sorted(steps)
    assert any(note["step"] == (note["epoch"] + 1) * STEPS_PER_EPOCH for note in notes), notes  # in evaluation
    assert_equal(final_state(run.folder), undisturbed(tmp_path / "undisturbed", *options))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_one_process_without_torchrun_stops_too(number: signal.Signals, tmp_path: Path) -> None:
    with Run(tmp_path, "--train.epochs", "500", ranks=0) as run:
        run.wait_for(2)
        run.process.send_signal(number)
        assert run.end() == 0, run.output
    note = json.loads((run.folder / "PREEMPTED").read_text())
    assert note == {"step": final_state(run.folder)["step"], "epoch": note["step"] // 7, "signal": number.name}
    assert "stopped and saved after step" in run.output
    assert "Traceback" not in run.output
    assert not (run.folder / "result.json").exists()


@pytest.fixture
def large_pictures(tmp_path: Path) -> Path:
    """A folder of 100 images, 40 ms each; the same noise under 100 names."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.effect_noise((2000, 2000), 50).save(folder / "000.jpg", quality=30)
    for number in range(1, 100):
        (folder / f"{number:03}.jpg").hardlink_to(folder / "000.jpg")
    return folder


def stop_everywhere(run: Run) -> list[int]:
    """Send SIGTERM to every process of a run, as to a process group, and return which there were."""
    everywhere = [*run.decoders(), *run.workers(), run.process.pid]
    for pid in everywhere:
        os.kill(pid, signal.SIGTERM)
    return everywhere


def all_gone(pids: list[int]) -> bool:
    return not any(command_line(pid) for pid in pids)


def wait_until(condition: Callable[[], object], run: Run, seconds: float = 240) -> None:
    ended = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ended, run.output
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "code"), [(0, 0), (2, 1)])  # torchrun itself ends with 1 after a signal
def test_a_signal_while_two_processes_decode_is_heeded_after_the_first_step(
    ranks: int, code: int, tmp_path: Path, large_pictures: Path
) -> None:
    options = [
        *("--data.name", f"folder:{large_pictures}", "--data.cache", str(tmp_path / "cache"), "--data.workers", "2"),
        *("--data.image_size", "16", "--model.num_clusters", "3", "--data.batch_size", "32", "--train.epochs", "500"),
    ]
    for signalled in ("while decoding", "while training"):
        with Run(tmp_path, *options, ranks=ranks) as run:
            if signalled == "while decoding":
                wait_until(lambda: len(run.decoders()) >= 2, run)
            else:
                run.wait_for(4)
                assert not run.decoders()
            everywhere = stop_everywhere(run)
            assert run.end() == code, run.output
            wait_until(partial(all_gone, everywhere), run, 10)
        note = run.preempted()
        assert note is not None, run.output
        assert note["signal"] == "SIGTERM"
        assert note["step"] == final_state(run.folder)["step"]
        assert (note["step"] == 1) == (signalled == "while decoding")


@pytest.mark.slow
def test_a_suspended_rank_is_a_clear_error_within_the_timeout(tmp_path: Path) -> None:
    timeout = 12.0
    with Run(tmp_path, "--train.epochs", "500", "--run.timeout_minutes", str(timeout / 60)) as run:
        run.wait_for(2)
        os.kill(run.workers()[1], signal.SIGSTOP)
        started = time.monotonic()
        while "waited longer than run.timeout_minutes (0.2). Nothing is heard of rank 1" not in run.output:
            assert time.monotonic() - started < timeout + 10, run.output
            time.sleep(0.1)
        assert "Traceback" not in run.output
