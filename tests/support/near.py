"""How near a kernel must come to float64."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def assert_near(value: Tensor, want: Tensor, tolerance: float, floor: float = 0.0) -> None:
    """The largest error is `tolerance` of the largest value, or of `floor`; NaN stands where it is wanted."""
    assert value.shape == want.shape
    assert torch.equal(value.isnan(), want.isnan())
    error = (value.double() - want).nan_to_num().abs().max()
    assert error <= tolerance * max(floor, float(want.nan_to_num().abs().max())), f"{error:.3g}"
