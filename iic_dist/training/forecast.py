"""How long a training will take: said once, after its first steps, where that is hours."""

from __future__ import annotations

import time
from collections.abc import Callable

from iic_dist.wording import duration

HOUR = 3600.0

_FIRST = 2  # steps that take longer than others: memory is taken, kernels are chosen or compiled
_STEPS, _SECONDS = 3, 10.0  # that are looked at, at least


class Forecast:
    """Watches the first steps, and tells how long the rest takes.

    Args:
        advice: What would make it faster.
        seconds: Returns the time of a clock that never goes back, seconds.
        now: Returns the time of day, seconds since 1970.
    """

    def __init__(
        self,
        advice: str,
        seconds: Callable[[], float] = time.perf_counter,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._advice, self._seconds, self._now = advice, seconds, now
        self._steps, self._started, self._told = 0, 0.0, False

    def after_step(self, left: int) -> str | None:
        """Count a step; return what is to be said now, mostly nothing.

        Args:
            left: Steps that are still to be done.
        """
        if self._told:
            return None
        self._steps += 1
        if self._steps <= _FIRST:
            self._started = self._seconds()
            return None
        measured, elapsed = self._steps - _FIRST, self._seconds() - self._started
        if measured < _STEPS or elapsed < _SECONDS:
            return None
        self._told = True
        expected = left * elapsed / measured
        if expected < HOUR:
            return None
        end = time.strftime("%a %d %b %H:%M", time.localtime(self._now() + expected))
        return f"training takes about {duration(expected)} on this machine, until {end}; faster: {self._advice}"


def advice(epochs: str, backbone: str, device: str) -> str:
    """Say what makes a training faster.

    Args:
        epochs: The option that says how many there are.
        backbone: That is trained.
        device: The type of the device.
    """
    ways = [f"fewer {epochs}"]
    if backbone != "small_cnn":
        ways.append("a smaller --model.backbone")
    ways += {"cpu": ["a GPU"], "cuda": ["more GPUs"]}.get(device, [])
    return f"{', '.join(ways[:-1])}, or {ways[-1]}" if len(ways) > 2 else " or ".join(ways)
