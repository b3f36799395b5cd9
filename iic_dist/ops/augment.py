"""The native op that makes views in one pass: image and parameters to the normalised view.

Its twin in PyTorch is `iic_dist.views.apply`, which takes its parameters by name; the contract stands in
csrc/augment.h. Sides of images and views go up to 32767 pixels, of views on CUDA up to 2048; what does not fit into
shared memory there is kept in global memory, which csrc/cuda/augment_cuda.cu explains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from iic_dist.ops import backend

OP = "augment_views"
NEUTRAL = {
    "affine": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "box": None,  # the whole image
    "flip": (0.0,),
    "brightness": (1.0,),
    "contrast": (1.0,),
    "saturation": (1.0,),
    "hue": (0.0,),
    "gray": (0.0,),
    "sigma": (0.0,),
}
"""Columns of the op's table, in order, as csrc/augment.h names them, and what leaves an image as it is."""


def table(drawn: Mapping[str, Tensor | None], count: int, height: int, width: int, device: torch.device) -> Tensor:
    """Put the parameters of views side by side, neutral where nothing was drawn.

    Args:
        drawn: fields of `ViewParameters`, (count,) or (count, columns) each.

    Returns:
        (count, 17) float32.
    """
    columns = []
    for name, neutral in NEUTRAL.items():
        value = drawn[name]
        if value is not None:
            columns.append(value if value.dim() == 2 else value.float().unsqueeze(1))
            continue
        for number in (0.0, 0.0, height, width) if neutral is None else neutral:
            columns.append(torch.full((count, 1), number, device=device))
    return torch.cat(columns, dim=1)


def augment_views(
    images: Tensor,
    rows: Tensor,
    parameters: Tensor,
    *,
    size: int,
    blur_kernel: int,
    sobel: bool,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Make V views of each image of a batch; `supported` says where this can be called.

    Args:
        images: (M, C, H, W) uint8.
        rows: (N,) int64, place of each image of the batch in `images`.
        parameters: (V*N, 17) as `table` makes it; view v of image i in row v*N + i.
        size, blur_kernel, sobel, mean, std: as in `ViewSpec`; blur_kernel=1 where no view is blurred.
        dtype: of the views: float32, bfloat16 or float16.
        channels_last: memory format of the views.

    Returns:
        (V*N, C', size, size).
    """
    views: Tensor = torch.ops.iic_dist.augment_views.default(
        images, rows, parameters, size, blur_kernel, sobel, mean, std, dtype, channels_last
    )
    return views


def _fake(
    images: Tensor,
    rows: Tensor,
    parameters: Tensor,
    size: int,
    blur_kernel: int,
    sobel: bool,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    shape = (parameters.shape[0], 2 if sobel else images.shape[1], size, size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)


DEVICES = backend.devices_of(OP)
"""The device types of the native op."""
if DEVICES:
    torch.library.register_fake(f"iic_dist::{OP}", _fake)


def supported(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `impl` ("auto", "fused" or "torch") means the native op for views of `dtype` on `device`.

    Raises:
        ValueError: `impl` is none of the three.
        RuntimeError: "fused" was asked for and is not there, or for float64, which only PyTorch computes; says why.
    """
    fused = backend.choose(impl, device.type, DEVICES, "views") == "fused"
    if fused and dtype == torch.float64 and impl == "fused":
        raise RuntimeError("impl='fused': views of float64 are made in PyTorch; use impl='auto'")
    return fused and dtype != torch.float64
