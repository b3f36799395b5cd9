"""launch/local.sh: a killed rank costs nothing but time; a signal saves."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from launched import (
    LAUNCH,
    SMALL,
    STEPS,
    assert_same_weights,
    children,
    end,
    kill,
    output,
    start,
    steps_done,
    wait_until,
)


@pytest.mark.slow
def test_after_a_killed_rank_the_run_goes_on_to_the_same_weights(tmp_path: Path, undisturbed: Path) -> None:
    process = start(LAUNCH / "local.sh", *SMALL, "--run.name", "killed", cwd=tmp_path, RANKS="2")
    folder = tmp_path / "runs" / "killed"
    try:
        wait_until(lambda: steps_done(folder) > STEPS // 3, 200, lambda: output(tmp_path))
        [agent] = [child for child in children(process.pid) if children(child)]
        kill(children(agent)[1:2])
        assert process.wait(timeout=300) == 0, output(tmp_path)
    finally:
        end(process)
    assert "going on after epoch" in output(tmp_path)
    assert json.loads((folder / "result.json").read_text())["world_size"] == 2
    assert_same_weights(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_after_a_signal_the_same_command_goes_on_to_the_same_weights(
    number: signal.Signals, tmp_path: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "runs" / "stopped"
    for expected in (75, 0):
        process = start(LAUNCH / "local.sh", *SMALL, "--run.name", "stopped", cwd=tmp_path, RANKS="2")
        try:
            if expected:
                wait_until(lambda: steps_done(folder) > STEPS // 3, 200, lambda: output(tmp_path))
                process.send_signal(number)
            assert process.wait(timeout=300) == expected, output(tmp_path)
        finally:
            end(process)
        assert (folder / "PREEMPTED").exists() == bool(expected)
        assert (folder / "result.json").exists() == (not expected)
    assert "runs/stopped: stopped and saved" in output(tmp_path)
    assert_same_weights(folder, undisturbed)


def test_a_mistake_in_the_options_is_not_tried_again(tmp_path: Path) -> None:
    command = [LAUNCH / "local.sh", "--optim.lr", "-1"]
    process = start(*command, cwd=tmp_path, RANKS="1", RESTARTS="0")
    try:
        assert process.wait(timeout=120) == 1
    finally:
        end(process)
    assert output(tmp_path).count("error: optim.lr=-1.0: must be above 0") == 1
