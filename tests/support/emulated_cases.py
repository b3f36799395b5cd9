"""What the emulated CUDA kernels must do, case by case; the tests and the mutations run the same tables.

Each `check_...` takes the ops and a case, and raises AssertionError where a value is wrong and RuntimeError where a thread
did what it must not. Oracles are formulas in float64 on the rounded inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import published
import torch
from torch import Tensor
from view_cases import allowed, arguments, make, smooth
from view_specs import EVERYTHING, GRAY

from iic_dist.ops import augment as native
from iic_dist.ops import iic

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def assert_near(value: Tensor, want: Tensor, tolerance: float, floor: float = 0.0) -> None:
    """The largest error is `tolerance` of the largest value, or of `floor`; NaN stands where it is wanted."""
    assert value.shape == want.shape
    assert torch.equal(value.isnan(), want.isnan())
    error = (value.double() - want).nan_to_num().abs().max()
    assert error <= tolerance * max(floor, float(want.nan_to_num().abs().max())), f"{error:.3g}"


# ---- IIC

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
        more = "".join(f"-{each}" for each in (self.layout, self.scale, self.capability) if each not in ("dense", 2.0, 9))
        return f"{self.n}x{self.h}x{self.k}x{self.repeats}-{str(self.dtype)[6:]}{more}"


# One row; one cluster; the borders of each compiled K, of rows in a tile and in a chunk; odd and even K; past the kernels.
IIC_SHAPES = (
    *((1, 1, 2, 1), (1, 2, 7, 3), (5, 2, 1, 1), (63, 2, 10, 2), (70, 1, 16, 1), (65, 2, 17, 2), (130, 1, 32, 1)),
    *((33, 2, 33, 1), (45, 1, 48, 2), (31, 1, 49, 1), (40, 1, 80, 1), (9, 2, 81, 2), (32, 1, 105, 1), (35, 1, 112, 2)),
    *((3, 1, 113, 1), (64, 1, 160, 2), (17, 2, 161, 2), (9, 1, 257, 1)),
)
IIC_CASES = [
    *(IIC(*shape, dtype) for dtype in DTYPES for shape in IIC_SHAPES),
    *(IIC(70, 3, k, 2, dtype, layout) for dtype, k in ((torch.float32, 5), (torch.bfloat16, 50), (torch.float16, 170))
      for layout in ("permuted", "gaps", "cut")),
    *(IIC(40, 2, k, 2, torch.float32, "expanded") for k in (6, 36)),
    *(IIC(70, 2, k, 2, torch.float32, scale=1e4) for k in (10, 40, 170)),
    IIC(5, 1, 1025, 1, torch.bfloat16),
    IIC(40, 2, 60, 1, torch.float32, capability=8),
    # Several tiles in a block: 132 multiprocessors are full.
    IIC(140, 132, 3, 1, torch.float32),
    IIC(70, 396, 33, 1, torch.bfloat16),
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


# ---- NT-Xent

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
    # One block of rows for each multiprocessor: the columns are not split.
    NTXent(2200, 8, 0, 4400, torch.bfloat16),
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


# ---- views


@dataclass(frozen=True)
class View:
    """Views of `size` of images of `side`, with all that can be drawn."""

    side: int
    size: int
    channels: int
    sobel: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    batch: int = 2

    def __str__(self) -> str:
        more = "-sobel" * self.sobel + "-last" * self.channels_last
        return f"{self.side}to{self.size}-{self.channels}-{str(self.dtype)[6:]}{more}"


# In shared memory everything (8, 32), all but the image (200 to 20), but the blurred planes (50 to 80), no plane (130).
VIEW_CASES = [
    *(View(*sides, channels, sobel) for sides in ((8, 9), (32, 32), (1, 1)) for channels in (1, 3) for sobel in (False, True)),
    *(View(*sides, 3, batch=1) for sides in ((200, 20), (97, 64), (50, 80), (64, 130))),
    View(30, 160, 1, batch=1),
    *(View(17, 12, 3, sobel, dtype, last) for dtype in DTYPES[2:] for sobel in (False, True) for last in (False, True)),
    View(17, 12, 3, channels_last=True),
]


def check_view(ops: Any, case: View) -> None:
    spec = replace(EVERYTHING if case.channels == 3 else GRAY, size=case.size, sobel=case.sobel)
    spec = replace(spec, mean=(), std=()) if case.sobel else spec
    images = smooth(case.batch, case.channels, case.side, case.side + 3)
    expected = make(spec, images, "torch", torch.float64)
    given: dict[str, Any] = {"dtype": case.dtype, "channels_last": case.channels_last}
    made = emulated_views(ops, spec, images, **given)
    assert made.dtype == case.dtype
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(case.dtype, 0.0)
    torch.testing.assert_close(made.double(), expected, rtol=rounding, atol=allowed(spec))


def emulated_views(ops: Any, spec: Any, images: Tensor, **given: Any) -> Tensor:
    """`view_cases.make` with the emulated op."""

    def op(images: Tensor, rows: Tensor, parameters: Tensor, **more: Any) -> Tensor:
        made: Tensor = ops.augment_views(images, rows, parameters, *more.values())
        return made

    with mock.patch.object(native, "supported", lambda *_: True), mock.patch.object(native, "augment_views", op):
        return make(spec, images, "fused", **given)


def check_many_views(ops: Any) -> None:
    """More views than blocks where planes are in global memory: a block takes one after another."""
    rows = torch.arange(3).repeat(172)
    parameters = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0.8]).repeat(516, 1)
    parameters[:, 11] = torch.linspace(0.5, 1, 516)
    images = torch.randint(1, 256, (3, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = {"images": images, "rows": rows, "parameters": parameters, "size": 65, "mean": [], "std": []}
    made = ops.augment_views(*arguments(**given))
    expected = images[rows].double() / 255 * parameters[:, 11].double().view(-1, 1, 1, 1)
    assert_near(made, expected.expand(516, 3, 65, 65), 1e-5)
