"""Images and arguments that the tests of the native views share, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iic_dist.views.spec import ViewSpec
from iic_dist.views.views import Views

TOLERANCE = 1e-5
"""In pixels of [0, 1]; normalising and Sobel multiply it."""


def smooth(batch: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Bytes as in a picture: noise under a ramp. The hue of nearly gray noise would multiply each rounding."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 80, (batch, channels, height, width), generator=generator)
    ramp = torch.linspace(0, 100, width) + torch.linspace(0, 75, height).unsqueeze(1)
    return (noise + ramp * torch.tensor([1.0, 0.3, 0.7])[:channels].view(-1, 1, 1)).to(torch.uint8)


def make(spec: ViewSpec, images: Tensor, impl: str, dtype: torch.dtype = torch.float32, **more: Any) -> Tensor:
    """First views and two second ones of the images, in another order and with another one twice."""
    rows = torch.arange(len(images), device=images.device).flip(0)
    rows[:1] = len(images) // 2
    views = Views(spec, spec, spec, 2, seed=7, impl=impl)
    return views.training(images, rows, rows + 100, 1, dtype=dtype, **more)


def allowed(spec: ViewSpec) -> float:
    return TOLERANCE * (8 if spec.sobel else 1) / min(spec.std, default=1.0)


def arguments(dtype: torch.dtype = torch.float32, device: str = "cpu", **changed: Any) -> tuple[Any, ...]:
    """Arguments of the op: three images, two rows, two views each."""
    parameters = torch.tensor([1.0, 0, 0, 0, 1, 0, 1, 2, 5, 6, 1, 1.2, 0.7, 1.1, 0.1, 0, 0.8]).repeat(4, 1)
    given = {
        "images": smooth(3, 3, 9, 10).to(device),
        "rows": torch.tensor([2, 0], device=device),
        "parameters": parameters.to(device),
        "size": 8,
        "blur_kernel": 3,
        "sobel": False,
        "mean": [0.5],
        "std": [0.2],
        "dtype": dtype,
        "channels_last": False,
    }
    return tuple((given | changed).values())
