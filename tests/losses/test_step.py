"""The losses of a step: each head's own, weighted, summed, and what is kept to be logged."""

from __future__ import annotations

import itertools

import published
import pytest
import torch
from torch import Tensor

from iic_dist.losses import IICTerms
from iic_dist.losses.objective import Objective
from iic_dist.losses.step import StepLosses

N, VIEWS, PRIOR = 6, 3, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
WEIGHTS = {"clustering": 1.0, "overclustering": 0.3, "contrastive": 2.5}
OBJECTIVES = {"clustering": Objective(1.5, PRIOR), "overclustering": Objective(1.0)}


@pytest.fixture
def outputs() -> list[tuple[str, Tensor]]:
    """Of three views of six images: two sub-heads of three clusters, two of seven, embeddings of five numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"clustering": (2, 3), "overclustering": (2, 7), "contrastive": (5,)}
    return [
        (head, torch.randn(VIEWS * N, *shape, generator=generator, dtype=torch.float64).requires_grad_())
        for head, shape in shapes.items()
    ]


def losses() -> StepLosses:
    return StepLosses(WEIGHTS, OBJECTIVES, temperature=0.3, impl="torch", views=VIEWS, world_size=1)


def expected(head: str, output: Tensor) -> Tensor:
    """The published loss: of a first view with all the others, or the mean over all pairs of views."""
    first, second = output[:N], output[N:]
    if head == "contrastive":
        pairs = itertools.combinations(output.split(N), 2)
        return torch.stack([published.nt_xent(*pair, 0.3) for pair in pairs]).mean()
    towards = OBJECTIVES[head]
    return published.iic(first, second, towards.entropy_weight, towards.prior).mean()


@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 2], [0, 1, 2]], ids=str)
def test_the_sum_is_that_of_the_published_losses(outputs: list[tuple[str, Tensor]], chosen: list[int]) -> None:
    taking_part = [outputs[index] for index in chosen]
    loss, terms = losses()(taking_part)
    wanted = torch.stack([WEIGHTS[head] * expected(head, output) for head, output in taking_part]).sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    leaves = [output for _, output in taking_part]
    gradients = torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert list(terms) == [head for head, _ in taking_part]


def test_what_is_logged_is_unweighted_and_without_a_gradient(outputs: list[tuple[str, Tensor]]) -> None:
    _, terms = losses()(outputs)
    for head, output in outputs:
        logged = terms[head]
        values = tuple(logged) if isinstance(logged, IICTerms) else (logged,)
        assert not any(value.requires_grad for value in values)
        mean = logged.loss.mean() if isinstance(logged, IICTerms) else logged
        torch.testing.assert_close(mean, expected(head, output).detach(), rtol=1e-12, atol=1e-12)
