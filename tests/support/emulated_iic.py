"""The IIC kernels on the emulated device, case by case; the tests and the mutations run the same table.

A check takes the ops and a case. It raises AssertionError where a value is wrong, and RuntimeError where a thread did
what it must not. The oracles are formulas in float64 on the rounded inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import published
import torch
from near import DTYPES, assert_near
from torch import Tensor

from iic_dist.ops import iic

# Largest error of the sums and of the gradients, relative to the largest value: the kernels, and the library, whose
# operands are bfloat16 for logits of 16 bits. Gradients of 16 bits are rounded to them.
IIC_SUMS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
IIC_GRADIENTS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 6e-4}


@dataclass(frozen=True)
class IIC:
    """N images, H sub-heads, K clusters, R second views of each image."""

    n: int
    h: int
    k: int
    repeats: int
    dtype: torch.dtype
    layout: str = "dense"
    scale: float = 2.0
    capability: int = 9

    def __str__(self) -> str:
        more = "".join(
            f"-{each}" for each in (self.layout, self.scale, self.capability) if each not in ("dense", 2.0, 9)
        )
        return f"{self.n}x{self.h}x{self.k}x{self.repeats}-{str(self.dtype)[6:]}{more}"


# One row; one cluster; borders of each compiled K, of rows in a tile and in a chunk; odd and even K; past the kernels.
IIC_SHAPES = (
    *((1, 1, 2, 1), (1, 2, 7, 3), (5, 2, 1, 1), (63, 2, 10, 2), (70, 1, 16, 1), (65, 2, 17, 2), (130, 1, 32, 1)),
    *((33, 2, 33, 1), (45, 1, 48, 2), (31, 1, 49, 1), (40, 1, 80, 1), (9, 2, 81, 2), (32, 1, 105, 1), (35, 1, 112, 2)),
    *((3, 1, 113, 1), (64, 1, 160, 2), (17, 2, 161, 2), (9, 1, 257, 1)),
)
IIC_CASES = [
    *(IIC(*shape, dtype) for dtype in DTYPES for shape in IIC_SHAPES),
    *(
        IIC(70, 3, k, 2, dtype, layout)
        for dtype, k in ((torch.float32, 5), (torch.bfloat16, 50), (torch.float16, 170))
        for layout in ("permuted", "gaps", "cut")
    ),
    *(IIC(40, 2, k, 2, torch.float32, "expanded") for k in (6, 36)),
    *(IIC(70, 2, k, 2, torch.float32, scale=1e4) for k in (10, 40, 170)),
    IIC(5, 1, 1025, 1, torch.bfloat16),
    IIC(40, 2, 60, 1, torch.float32, capability=8),
    # Several tiles in a block, several chunks of a head; the last of either is not full.
    IIC(200, 3, 9, 2, torch.float32),
    IIC(140, 8, 20, 1, torch.bfloat16),
    IIC(130, 5, 33, 1, torch.float32),
    IIC(70, 12, 34, 2, torch.bfloat16),
    IIC(70, 4, 115, 1, torch.float16),
]


def permuted(x: Tensor) -> Tensor:
    return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def with_gaps(x: Tensor) -> Tensor:
    wide = torch.full((2 * x.shape[0], x.shape[1] + 1, x.shape[2]), math.nan, dtype=x.dtype)
    wide[::2, 1:] = x
    return wide[::2, 1:]


def cut_from_rows(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0], x.shape[1], x.shape[2] + 3), math.nan, dtype=x.dtype)
    wide[..., 2:-1] = x
    return wide[..., 2:-1]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "permuted": permuted,
    "gaps": with_gaps,
    "cut": cut_from_rows,
    "expanded": lambda x: x[:, :1].expand_as(x),
}


def logits(case: IIC) -> tuple[Tensor, Tensor]:
    """Second views that agree with the first ones in part."""
    generator = torch.Generator().manual_seed(case.n + case.k)
    a = torch.randn(case.n, case.h, case.k, generator=generator, dtype=torch.float64)
    noise = torch.randn(case.repeats, case.n, case.h, case.k, generator=generator, dtype=torch.float64)
    change = LAYOUTS[case.layout]
    return change((case.scale * a).to(case.dtype)), change((case.scale * (a + noise / 2)).flatten(0, 1).to(case.dtype))


def check_iic(ops: Any, case: IIC) -> None:
    a, b = logits(case)
    compare_iic(ops, a, b)


def compare_iic(ops: Any, a: Tensor, b: Tensor, entropy_weight: float = 1.5) -> None:
    """All three ops, one after the other, with the steps of float64."""
    dtype, h, k = a.dtype, a.shape[1], a.shape[2]
    result = torch.promote_types(dtype, torch.float32)
    weights = torch.linspace(0.5, 2.0, 2 * h, dtype=result)[::2]
    sums, *kept = ops.iic_joint(a, b)
    terms = ops.iic_information(sums, k, entropy_weight)
    gradients = ops.iic_logits_grad(a, b, *kept, terms[5], weights)
    exact, *exact_kept = iic.iic_joint(a.double(), b.double())
    exact_terms = iic.iic_information(exact, k, entropy_weight)
    exact_gradients = iic.iic_logits_grad(a.double(), b.double(), *exact_kept, exact_terms.joint_grad, weights.double())

    library = dtype == torch.float64 or k > 160
    rounds = library and dtype in (torch.bfloat16, torch.float16)
    assert all((each.numel() > 0) == library for each in kept)
    assert_near(sums, exact, 1e-3 if rounds else IIC_SUMS[dtype])
    for term, want in zip(terms, exact_terms, strict=True):
        assert term.dtype == result
        # Information is a small difference of logarithms: their size is the scale.
        assert_near(term, want, 2e-2 if rounds else 10 * IIC_SUMS[dtype], floor=math.log(k + 1))
    # Nothing is left of a gradient where all are sure, but the rounding of what cancels in it.
    size = 0.02 * float(exact_terms.joint_grad.nan_to_num().abs().max())
    for gradient, want in zip(gradients, exact_gradients, strict=True):
        assert (gradient.dtype, gradient.is_contiguous()) == (dtype, True)
        assert_near(gradient, want, 1e-2 if rounds else IIC_GRADIENTS[dtype], size)


def published_iic(ops: Any, a: Tensor, b: Tensor) -> None:
    """The loss and its gradient, by the formula of the paper and by autograd."""
    doubles = [x.double().requires_grad_() for x in (a, b)]
    loss = published.iic(*doubles)
    sums, *kept = ops.iic_joint(a, b)
    terms = ops.iic_information(sums, a.shape[2], 1.0)
    assert_near(terms[0], loss.detach(), 1e-5, floor=1.0)
    ones = torch.ones((), dtype=sums.dtype).expand(a.shape[1])
    for gradient, want in zip(
        ops.iic_logits_grad(a, b, *kept, terms[5], ones), torch.autograd.grad(loss.sum(), doubles), strict=True
    ):
        assert_near(gradient, want, IIC_GRADIENTS[a.dtype])
