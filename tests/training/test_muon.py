"""Muon, against the singular value decomposition and torch's own optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from iic_dist.models import SubHeads
from iic_dist.training import muon
from iic_dist.training.muon import ADAM_SHARE, Muon, orthogonal
from iic_dist.training.optim import build_optimizer


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16), (1, 9)])
def test_it_makes_orthogonal_what_the_decomposition_does(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(1.0, 0.2, min(shape), dtype=torch.float64)
    found = u.T @ orthogonal(u @ torch.diag(values) @ v, 5) @ v.T  # diagonal, if the directions are kept
    assert found.diagonal().min() > 0.65
    assert found.diagonal().max() < 1.25
    torch.testing.assert_close(found, torch.diag(found.diagonal()), rtol=0, atol=1e-12)


def test_nothing_stays_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_matrices_move_as_torchs_muon_moves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose iteration is in bfloat16, takes five steps, and whose momentum is ours times a constant."""
    monkeypatch.setattr(muon, "orthogonal", lambda matrix: orthogonal(matrix, 5))
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(20, 7, bias=False), nn.Linear(7, 30, bias=False))
    theirs, begun = copy.deepcopy(ours), copy.deepcopy(ours)
    mine = Muon(ours.parameters(), [], lr=0.1, momentum=0.9, weight_decay=0.2)
    other = torch.optim.Muon(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    for step in range(3):
        for model, optimizer in ((ours, mine), (theirs, other)):
            gradients(model, step)
            optimizer.step()
    for a, b, start in zip(ours.parameters(), theirs.parameters(), begun.parameters(), strict=True):
        assert (a - b).norm() < 0.03 * (b - start).norm()


def test_a_kernel_is_the_matrix_of_its_filters_in_any_layout_and_keeps_its_norm() -> None:
    torch.manual_seed(0)
    kernel, matrix = nn.Conv2d(3, 40, 3, bias=False), nn.Linear(27, 40, bias=False)
    last = copy.deepcopy(kernel).to(memory_format=torch.channels_last)
    matrix.weight.data = kernel.weight.data.flatten(1).clone()
    norm = matrix.weight.data.norm()
    optimizers = [Muon(module.parameters(), [], lr=0.1) for module in (kernel, matrix, last)]
    for step in range(3):
        gradient = torch.randn(40, 27, generator=torch.Generator().manual_seed(step))
        for module, optimizer in zip((kernel, matrix, last), optimizers, strict=True):
            module.weight.grad = gradient.view_as(module.weight).clone(memory_format=torch.preserve_format)
            optimizer.step()
        matrix.weight.data *= norm / matrix.weight.data.norm()
    assert torch.equal(kernel.weight.flatten(1), matrix.weight)
    torch.testing.assert_close(last.weight, kernel.weight)
    torch.testing.assert_close(kernel.weight.norm(), norm)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_kernel_of_zeros_leaves_them() -> None:
    kernel = nn.Conv2d(1, 2, 3, bias=False)
    nn.init.zeros_(kernel.weight)
    optimizer = Muon(kernel.parameters(), [], lr=0.1)
    gradients(kernel, 0)
    optimizer.step()
    assert kernel.weight.isfinite().all()
    assert kernel.weight.abs().max() > 0.01


def test_vectors_positions_and_sub_heads_get_adam() -> None:
    torch.manual_seed(0)
    mine = nn.ModuleDict({"backbone": nn.Conv2d(2, 4, 3), "heads": SubHeads(4, 3, 2)})
    mine["backbone"].register_parameter("positions", nn.Parameter(torch.randn(1, 5, 4)))
    adam = copy.deepcopy(mine)
    optimizer = build_optimizer(mine, "muon", lr=0.05, weight_decay=0.1)
    other = build_optimizer(adam, "adamw", lr=0.05 * ADAM_SHARE, weight_decay=0.1)
    for step in range(3):
        for model, each in ((mine, optimizer), (adam, other)):
            gradients(model, step)
            each.step()
    theirs = dict(adam.named_parameters())
    same = {name for name, parameter in mine.named_parameters() if torch.equal(parameter, theirs[name])}
    assert same == {"backbone.bias", "backbone.positions", "heads.linear.weight", "heads.linear.bias"}


def test_it_goes_on_from_its_state_bit_for_bit() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    optimizer = build_optimizer(whole, "muon", lr=0.05)
    for step in range(4):
        if step == 2:
            resumed = copy.deepcopy(whole)
            again = build_optimizer(resumed, "muon", lr=0.05)
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        gradients(whole, step)
        optimizer.step()
    for step in (2, 3):
        gradients(resumed, step)
        again.step()
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
