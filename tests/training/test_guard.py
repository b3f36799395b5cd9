from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from iic_dist.errors import RunError
from iic_dist.training.guard import Poll, StepGuard, Verdicts
from iic_dist.training.optim import build_optimizer
from iic_dist.training.stop import Stopping

CPU = torch.device("cpu")


class Small:
    """A network with batch normalisation, in training."""

    def __init__(self, optimizer: str = "adam", max_skipped: int = 3, clip_norm: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.optimizer = build_optimizer(self.model, optimizer, lr=0.1, weight_decay=0.01)
        self.guard = StepGuard(self.model, self.optimizer, CPU, max_skipped)
        self.clip_norm = clip_norm

    def step(self, value: float = 1.0, stop: bool = False) -> bool:
        self.guard.begin()
        inputs = torch.arange(15.0).view(5, 3) * value
        loss = self.model(inputs).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        skipped = self.guard.end(loss.detach(), stop, self.clip_norm)
        self.optimizer.step()
        return bool(skipped)

    def everything(self) -> list[torch.Tensor]:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        floating = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        return [value.clone() for value in (*floating, *states)]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str, bad: float) -> None:
    """Also where it is the first, before the optimizer has a state."""
    small, undisturbed = Small(optimizer), Small(optimizer)
    for value, skipped in ((bad, True), (1.0, False), (bad, True), (bad, True), (2.0, False)):
        before = small.everything()
        assert small.step(value) is skipped
        if skipped and len(before) == len(small.everything()):
            assert all(map(torch.equal, before, small.everything()))
        if not skipped:
            undisturbed.step(value)
    assert all(map(torch.equal, small.everything(), undisturbed.everything()))
    small.guard.heed(leave=0)
    assert (small.guard.skipped, small.guard.skipped_in_a_row) == (3, 0)


def test_too_many_in_a_row_end_the_run_and_others_do_not() -> None:
    small = Small(max_skipped=3)
    for value in (math.nan, math.nan, math.nan, 1.0, math.nan, math.nan, math.nan):
        small.step(value)
        small.guard.heed(leave=1)
    small.guard.heed(leave=0)
    small.step(math.nan)
    with pytest.raises(RunError, match="4 steps in a row was not finite.*max_skipped_steps=3") as caught:
        small.guard.heed(leave=0)
    assert "\n" not in str(caught.value)
    assert all(value.isfinite().all() for value in small.everything())


def test_the_gradient_is_clipped_as_torch_does() -> None:
    small, other = Small("sgd", clip_norm=0.5), Small("sgd")
    for _ in range(3):
        small.step()
        other.guard.begin()
        loss = other.model(torch.arange(15.0).view(5, 3)).square().sum()
        other.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other.model.parameters(), 0.5)
        other.guard.end(loss.detach(), False)
        other.optimizer.step()
    assert all(map(torch.equal, small.everything(), other.everything()))


def test_a_wish_to_stop_is_read_a_step_later() -> None:
    small = Small()
    small.step(stop=True)
    small.guard.heed(leave=1)
    small.step()
    with pytest.raises(Stopping):
        small.guard.heed(leave=1)


def test_the_counts_come_back() -> None:
    small, other = Small(), Small()
    small.step(math.nan)
    small.guard.heed(leave=0)
    other.guard.load_state_dict(small.guard.state_dict())
    assert (other.guard.skipped, other.guard.skipped_in_a_row) == (1, 1)


def test_verdicts_come_in_order_and_the_newest_wait() -> None:
    verdicts = Verdicts(CPU)
    for flags in ((1.0, 0.0), (0.0, 2.0), (0.0, 0.0)):
        verdicts.post(torch.tensor(flags))
    assert verdicts.read(leave=1) == [(True, False), (False, True)]
    assert verdicts.read(leave=1) == []
    assert verdicts.read(leave=0) == [(False, False)]


def test_a_poll_answers_one_call_later() -> None:
    poll = Poll(CPU)
    assert [poll.stop(asked) for asked in (False, True, True, False)] == [False, False, True, True]
