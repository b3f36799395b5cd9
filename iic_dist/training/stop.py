"""SIGTERM and SIGUSR1: a wish to stop, which a run fulfils between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Takes note of SIGTERM and SIGUSR1 while it is entered, instead of dying of them.

    torchrun, Slurm and Kubernetes send one of them some time before they kill.

    Attributes:
        received: Name of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._take_note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Stopping(Exception):
    """All ranks have agreed to stop here; raised on each of them at the same step."""
