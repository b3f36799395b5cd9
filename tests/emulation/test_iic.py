"""The IIC kernels on the emulated device: every family, dtype and border against float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from emulated_iic import IIC, IIC_CASES, check_iic, compare_iic, logits, published_iic

FAMILIES = [10, 70, 170]
"""Numbers of clusters, one for each."""
families = pytest.mark.parametrize("k", FAMILIES)


@pytest.mark.parametrize("case", IIC_CASES, ids=str)
def test_equals_float64(ops: Any, compiled: Path, case: IIC) -> None:
    with emulation.running(compiled, compute_capability=case.capability):
        check_iic(ops, case)


@families
def test_equals_published(ops: Any, k: int) -> None:
    published_iic(ops, *logits(IIC(20, 2, k, 2, torch.float32)))


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_comes_out_of_its_head(ops: Any, k: int, dtype: torch.dtype) -> None:
    a, b = logits(IIC(40, 3, k, 2, dtype))
    b[50, 1, 2] = math.nan
    compare_iic(ops, a, b)


@families
def test_the_order_of_warps_changes_no_bit(ops: Any, compiled: Path, k: int) -> None:
    a, b = logits(IIC(70, 2, k, 2, torch.float32))
    seen = []
    for seed in range(3):
        with emulation.running(compiled, seed):
            sums, *kept = ops.iic_joint(a, b)
            terms = ops.iic_information(sums, k, 1.0)
            seen.append([sums, *terms, *ops.iic_logits_grad(a, b, *kept, terms[5], torch.ones(2))])
    for others in seen[1:]:
        assert all(torch.equal(old, new) for old, new in zip(seen[0], others, strict=True))


def test_too_many_heads(ops: Any) -> None:
    a = torch.zeros(1, 65536, 2)
    with pytest.raises(ValueError, match="65536 sub-heads"):
        ops.iic_joint(a, a)


def test_a_gradient_of_another_shape(ops: Any) -> None:
    a, none = torch.zeros(2, 3, 4), torch.zeros(0)
    with pytest.raises(ValueError, match="joint_grad"):
        ops.iic_logits_grad(a, a, none, none, torch.zeros(3, 4, 5), torch.ones(3))
    with pytest.raises(ValueError, match="grad_loss"):
        ops.iic_logits_grad(a, a, none, none, torch.zeros(3, 4, 4), torch.ones(2))
