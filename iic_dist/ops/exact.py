"""Functions with the same bits on every device, from correctly rounded operations alone.

IEEE 754 fixes the result of + - * / and the square root, but libraries round powers and trigonometric functions each
in its own way. Every step here is a PyTorch operation of its own, so that no compiler contracts a product and a sum;
and no tensor is divided by a Python number, which PyTorch turns into a product on CUDA alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(6)]
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(7)]
_HALVINGS = 3  # of an angle, before its series: 180 degrees become 0.4, and the seventh term is below 1e-15


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def cos_sin(degrees: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of float64 angles in [-180, 180] degrees, to about 1e-15; of 0 exactly 1 and 0."""
    angle = degrees * (math.pi / 180 / 2**_HALVINGS)
    square = angle * angle
    cos, sin = _polynomial(square, _COS), angle * _polynomial(square, _SIN)
    for _ in range(_HALVINGS):
        cos, sin = cos * cos - sin * sin, (cos + cos) * sin
    return cos, sin


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """base ** exponent, to about 1e-15 of it: the product of base's repeated square roots at the exponent's 1 bits.

    Args:
        base: (B,) float64, above 0.
        exponent: (B,) float64, multiples of 2^-24 in [0, 1), as `philox.uniforms` draws them.
    """
    roots = []
    for _ in range(24):
        base = torch.sqrt(base)
        roots.append(base)
    place = torch.arange(23, -1, -1, device=base.device).unsqueeze(1)
    bit = (exponent * 2.0**24).long() >> place & 1
    factors = torch.where(bit == 1, torch.stack(roots), 1.0)
    for half in (12, 6, 3):  # in this order, which a reduction would leave open
        factors = factors[:half] * factors[half:]
    return factors[0] * factors[1] * factors[2]
