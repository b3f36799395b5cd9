"""The NT-Xent kernels on the emulated device, case by case; the tests and the mutations run the same table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from near import DTYPES, assert_near
from torch import Tensor

NT_XENT = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Largest error of a gradient, relative to the largest value, at temperature 0.5; others multiply it."""


@dataclass(frozen=True)
class NTXent:
    """2G rows of D features, of which num_rows from first_row on belong to the rank."""

    g: int
    d: int
    first_row: int
    num_rows: int
    dtype: torch.dtype
    temperature: float = 0.5
    rows: str = "random"

    def __str__(self) -> str:
        more = f"-{self.rows}" if self.rows != "random" else ""
        return f"{2 * self.g}x{self.d}-{self.first_row}+{self.num_rows}-{str(self.dtype)[6:]}-{self.temperature}{more}"


# The borders of tiles and of blocks of rows; each shape of block; one, two and four chunks of 128 features; longer rows
# than the kernels take; shards.
NT_XENT_SHAPES = (
    *((1, 3, 0, 2), (2, 1, 0, 4), (24, 17, 0, 48), (33, 16, 20, 30), (130, 33, 0, 260), (64, 128, 64, 64)),
    *((40, 130, 6, 40), (20, 256, 0, 40), (12, 257, 0, 24), (10, 512, 10, 10), (9, 513, 0, 18)),
)
NT_XENT_CASES = [
    *(NTXent(*shape, dtype) for dtype in DTYPES for shape in NT_XENT_SHAPES),
    *(NTXent(30, 20, 0, 60, dtype, temperature) for dtype in DTYPES[1:] for temperature in (0.1, 0.005)),
    *(NTXent(30, 20, 0, 60, dtype, temperature, "opposite") for dtype in DTYPES[1:] for temperature in (0.5, 0.005)),
    *(NTXent(30, 40, 10, 40, dtype, rows="same") for dtype in DTYPES[1:]),
    *(NTXent(30, 40, 0, 60, dtype, rows="strided") for dtype in DTYPES[1:]),
    # Enough blocks of rows: the columns are not split.
    NTXent(600, 8, 0, 1200, torch.bfloat16),
    NTXent(64, 300, 0, 128, torch.float16),
]


def unit_rows(case: NTXent) -> Tensor:
    generator = torch.Generator().manual_seed(case.g + case.d)
    z = torch.randn(2 * case.g, case.d, generator=generator, dtype=torch.float64)
    if case.rows == "same":
        z = torch.ones_like(z)
    elif case.rows == "opposite":  # one row of which all others are the opposite: one exponential is not enough
        z = z[:1].repeat(2 * case.g, 1)
        z[7] = -z[7]
    z = torch.nn.functional.normalize(z, dim=1).to(case.dtype)
    return z.T.contiguous().T if case.rows == "strided" else z


def exact_nt_xent(z: Tensor, first_row: int, num_rows: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of all rows, similarities and gradients of the rank's, by the formulas of csrc/nt_xent.h."""
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-math.inf)
    lse = torch.logsumexp(similarity, 1)
    own = slice(first_row, first_row + num_rows)
    positive = torch.arange(first_row, first_row + num_rows).roll(num_rows // 2)
    weights = (similarity - lse.unsqueeze(1)).exp() + (similarity - lse).exp()
    gradient = (weights[own] @ z - 2 * z[positive]) / (len(z) * temperature)
    return lse, (z[own] * z[positive]).sum(1) / temperature, gradient


def check_nt_xent(ops: Any, case: NTXent) -> None:
    z = unit_rows(case)
    place = (case.first_row, case.num_rows, case.temperature)
    result = torch.promote_types(case.dtype, torch.float32)
    all_lse, positive, gradient = exact_nt_xent(z.double(), *place)
    lse = torch.stack([all_lse, all_lse], 1).to(result)[:, 1]
    made = *ops.nt_xent_rows(z, *place), ops.nt_xent_rows_grad(z, lse, *place)
    small = 1e-13 if case.dtype == torch.float64 else 2e-6
    own = all_lse[case.first_row : case.first_row + case.num_rows]
    sharp = max(1.0, 0.5 / case.temperature)
    size = 1 / (2 * case.g * case.temperature)  # of the terms that cancel in a gradient
    for value, want, tolerance, floor in zip(
        made, (own, positive, gradient), (small, small, sharp * NT_XENT[case.dtype]), (1.0, 1.0, size), strict=True
    ):
        assert value.dtype == result
        assert_near(value, want, tolerance, floor)
