from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from iic_dist.errors import UsageError
from iic_dist.training.optim import build_optimizer, learning_rate


def test_the_cosine_goes_up_and_down_to_zero() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, total_steps=110, base=2.0, schedule="cosine", warmup_steps=10)

    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(10) == 2.0
    assert rate(60) == pytest.approx(1.0)
    assert rate(35) == pytest.approx(1 + math.cos(math.pi / 4))
    assert 0 < rate(109) < 1e-3


def test_a_constant_rate_is_constant_after_the_warm_up() -> None:
    rates = [learning_rate(s, total_steps=5, base=3.0, schedule="constant", warmup_steps=2) for s in range(5)]
    assert rates == [1.5, 3.0, 3.0, 3.0, 3.0]
    with pytest.raises(UsageError, match="'linear'"):
        learning_rate(0, total_steps=5, base=3.0, schedule="linear")


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_only_matrices_decay_and_frozen_parameters_stay(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, name, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == [True, False, False, False, False, False]
    assert len([p for group in optimizer.param_groups for p in group["params"]]) == 4


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match="'lion'"):
        build_optimizer(nn.Linear(2, 2), "lion", lr=1.0)
