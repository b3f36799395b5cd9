from __future__ import annotations

import os
import signal

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
