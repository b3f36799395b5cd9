"""SIGTERM, SIGUSR1 and Ctrl-C: a wish to stop, which a run fulfils between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Takes note of SIGTERM, SIGUSR1 and SIGINT while it is entered, instead of dying of them.

    torchrun, Slurm and Kubernetes send one of the first two some time before they kill; Ctrl-C is SIGINT, and a second
    one ends the process at once.

    Attributes:
        received: Name of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._interrupted = False

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._interrupted = True
            if os.environ.get("RANK", "0") == "0":  # one line, and none that a handler must not take a lock for
                os.write(2, b"\nstopping after this step, and saving; Ctrl-C again ends at once, without saving\n")
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
