"""Inputs, tolerances and shards that the tests of the losses share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iic_dist.ops import backend

# Largest relative norm of the error by dtype of the input; the cancellation in g - <z, g> sets that of gradients.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
IMPLEMENTATIONS = [
    "torch",
    pytest.param(
        "fused", marks=pytest.mark.skipif(backend.WHY_NOT_FUSED is not None, reason=str(backend.WHY_NOT_FUSED))
    ),
]
SHARDS = [[12], [6, 6], [4, 4, 4], [3, 3, 3, 3], [7, 5], [1, 9, 2], [2, 5, 1, 4]]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


def logits(n: int, h: int, k: int, repeats: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = 2 * torch.randn(n, h, k, generator=generator, dtype=torch.float64)
    noise = torch.randn(repeats, n, h, k, generator=generator, dtype=torch.float64)
    return [a.to(dtype), (a + noise).flatten(0, 1).to(dtype)]


def embeddings(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return [(3 * a).to(dtype), (a + noise).to(dtype)]
