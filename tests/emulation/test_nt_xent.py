"""The NT-Xent kernels on the emulated device: every shape of block, dtype and border against float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from emulated_nt_xent import NT_XENT_CASES, NTXent, check_nt_xent, unit_rows


@pytest.mark.parametrize("case", NT_XENT_CASES, ids=str)
def test_equals_float64(ops: Any, case: NTXent) -> None:
    check_nt_xent(ops, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_comes_out(ops: Any, dtype: torch.dtype) -> None:
    z = unit_rows(NTXent(30, 20, 0, 60, dtype))
    z[41, 3] = math.nan
    lse, positive = ops.nt_xent_rows(z, 0, 60, 0.5)
    assert lse.isnan().all()
    assert positive.isnan().nonzero().flatten().tolist() == [11, 41]
    assert ops.nt_xent_rows_grad(z, lse, 0, 60, 0.5).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_warps_changes_no_bit(ops: Any, compiled: Path, dtype: torch.dtype) -> None:
    z = unit_rows(NTXent(70, 40, 0, 140, dtype))
    seen = []
    for seed in range(3):
        with emulation.running(compiled, seed):
            lse, positive = ops.nt_xent_rows(z, 0, 140, 0.1)
            seen.append((lse, positive, ops.nt_xent_rows_grad(z, lse, 0, 140, 0.1)))
    for others in seen[1:]:
        assert all(torch.equal(old, new) for old, new in zip(seen[0], others, strict=True))
