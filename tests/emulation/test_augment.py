"""The kernel that makes views, on the emulated device: every place of its memory against PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_views import VIEW_CASES, View, check_many_views, check_view
from view_cases import arguments


@pytest.mark.parametrize("case", VIEW_CASES, ids=str)
def test_the_views_of_pytorch(ops: Any, case: View) -> None:
    check_view(ops, case)


def test_more_views_than_blocks(ops: Any) -> None:
    check_many_views(ops)


def test_no_image_no_view(ops: Any) -> None:
    empty = {"rows": torch.zeros(0, dtype=torch.int64), "parameters": torch.zeros(0, 17)}
    assert ops.augment_views(*arguments(**empty)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_outside_of_the_images_stops_the_kernel(ops: Any, row: int) -> None:
    with pytest.raises(RuntimeError, match="assertion row >= 0"):
        ops.augment_views(*arguments(rows=torch.tensor([0, row])))


def test_too_large_views(ops: Any) -> None:
    with pytest.raises(ValueError, match="size=2049: at most 2048 on CUDA"):
        ops.augment_views(*arguments(size=2049))
