"""How long a training will take: what is said, when, and that a real one says it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from runs import Run

from iic_dist.training.forecast import Forecast, advice
from iic_dist.wording import duration


def said(seconds_a_step: float, steps: int, first: float = 0.0) -> list[tuple[int, str]]:
    """What is said of so many steps, and after which, by a clock of our own; the first step may take longer."""
    clock = [0.0]
    forecast = Forecast("fewer steps", seconds=lambda: clock[0], now=lambda: 1_790_000_000 + clock[0])
    lines = []
    for step in range(1, min(steps, 2000) + 1):
        clock[0] += seconds_a_step + (first if step == 1 else 0)
        if (line := forecast.after_step(steps - step)) is not None:
            lines.append((step, line))
    return lines


def test_hours_are_said_once_after_the_first_steps() -> None:
    """400 epochs of a ResNet-18 on two cores ran for hours before anybody knew."""
    [(step, line)] = said(1.5, 10_000, first=60)  # the first step, which compiles, does not count
    assert step == 9  # seven steps of 1.5 s behind the first two: more than ten seconds
    end = time.strftime("%a %d %b %H:%M", time.localtime(1_790_000_000 + 60 + 10_000 * 1.5))
    assert line == f"training takes about 4 h 10 min on this machine, until {end}; faster: fewer steps"
    [(step, line)] = said(300, 200)
    assert (step, line[:32]) == (5, "training takes about 16 h 20 min")  # three steps, however long they take
    [(step, line)] = said(0.01, 10**9)
    assert 1002 <= step <= 1003
    assert "115 days 18 h" in line or "115 days 17 h" in line


@pytest.mark.parametrize(("seconds_a_step", "steps"), [(1.0, 3000), (0.001, 10**6), (100.0, 20)])
def test_less_than_an_hour_is_not_worth_a_word(seconds_a_step: float, steps: int) -> None:
    assert said(seconds_a_step, steps) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.4, "0 s"), (45, "45 s"), (61, "1 min"), (59 * 60, "59 min"), (3600, "1 h"), (15_000, "4 h 10 min")),
        *((23.95 * 3600, "1 day"), (24 * 3600, "1 day"), (29 * 3600, "1 day 5 h"), (53 * 3600, "2 days 5 h")),
    ],
)
def test_a_time_is_as_exact_as_matters(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_advice_names_what_can_be_changed() -> None:
    ways = advice("--train.epochs", "resnet18", "cpu")
    assert ways == "fewer --train.epochs, a smaller --model.backbone, or a GPU"
    assert advice("--refine.epochs", "small_cnn", "cuda") == "fewer --refine.epochs or more GPUs"
    assert advice("--train.epochs", "small_cnn", "mps") == "fewer --train.epochs"


def test_a_training_of_hours_says_so(tmp_path: Path) -> None:
    with Run(tmp_path, "--train.epochs", "1000000", "--run.device", "cpu", ranks=0) as run:
        until = time.monotonic() + 240
        while "on this machine" not in run.output and run.process.poll() is None:
            assert time.monotonic() < until, run.output
            time.sleep(0.2)
        assert run.output.count("training takes about ") == 1
        assert "; faster: fewer --train.epochs or a GPU\n" in run.output
