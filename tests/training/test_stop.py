from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from iic_dist.training.stop import SIGNALS, StopSignals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == number.name  # the first
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_second_ctrl_c_ends_at_once_and_without_a_traceback() -> None:
    """Ctrl-C lost everything since the last checkpoint; now it saves, and a person in a hurry presses it twice."""
    program = (
        "import os, signal, time\nfrom iic_dist.training.stop import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT); assert stop.received == 'SIGINT'\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGINT
    (line,) = ended.stderr.strip().splitlines()
    assert line == "stopping after this step, and saving; Ctrl-C again ends at once, without saving"
