"""The kernel of views on the emulated device, case by case; the tests and the mutations run the same table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from near import DTYPES, assert_near
from torch import Tensor
from view_cases import allowed, arguments, make, smooth
from view_specs import EVERYTHING, GRAY

from iic_dist.ops import augment as native


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
    *(
        View(*sides, channels, sobel)
        for sides in ((8, 9), (32, 32), (1, 2))
        for channels in (1, 3)
        for sobel in (False, True)
    ),
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

    with mock.patch.object(native, "supported", return_value=True), mock.patch.object(native, "augment_views", op):
        return make(spec, images, "fused", **given)


def check_many_views(ops: Any) -> None:
    """More views than blocks where planes are in global memory: a block takes one after another."""
    rows = torch.arange(3).repeat(6)
    parameters = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0.8]).repeat(18, 1)
    parameters[:, 11] = torch.linspace(0.5, 1, 18)
    parameters[9:, 16] = 0  # not blurred, so that colours are the last thing done
    images = torch.randint(1, 256, (3, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = {"images": images, "rows": rows, "parameters": parameters, "size": 65, "mean": [], "std": []}
    made = ops.augment_views(*arguments(**given))
    expected = images[rows].double() / 255 * parameters[:, 11].double().view(-1, 1, 1, 1)
    assert_near(made, expected.expand(18, 3, 65, 65), 1e-5)
