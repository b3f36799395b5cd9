"""What only a GPU can show of the native views: parity, no wait for the host, graphs, repeatability, large images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from view_cases import allowed, arguments, make, smooth
from view_specs import EVERYTHING, GRAY

from iic_dist.ops import augment as native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif("cuda" not in native.DEVICES, reason="the extension has no CUDA kernels of views"),
]


# In shared memory everything (8, 32, 200), all but the image (64), but the blurred planes (80), no plane (130).
@pytest.mark.parametrize(("side", "size"), [(8, 9), (32, 32), (45, 64), (97, 64), (200, 20), (50, 80), (64, 130)])
@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_views_of_pytorch(channels: int, sobel: bool, side: int, size: int) -> None:
    spec = replace(EVERYTHING if channels == 3 else GRAY, size=size, sobel=sobel)
    spec = replace(spec, mean=(), std=()) if sobel else spec
    images = smooth(21, channels, side, side + 3)
    expected = make(spec, images, "torch", torch.float64)
    made = make(spec, images.cuda(), "fused")
    torch.testing.assert_close(made.cpu().double(), expected, rtol=0, atol=allowed(spec))
    assert torch.equal(make(spec, images.cuda(), "fused"), made)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_and_layouts_round_the_same_views(dtype: torch.dtype, channels_last: bool) -> None:
    for spec in (EVERYTHING, replace(EVERYTHING, sobel=True, mean=(), std=())):
        images = smooth(9, 3, 33, 31).cuda()
        made = make(spec, images, "fused", dtype, channels_last=channels_last)
        assert torch.equal(made, make(spec, images, "fused").to(dtype))


def test_no_wait_for_the_host_and_a_graph() -> None:
    op, given = torch.ops.iic_dist.augment_views, arguments(device="cuda")
    expected = op(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert op(*given).is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*given)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_no_image_no_view() -> None:
    empty = torch.zeros(0, dtype=torch.int64, device="cuda")
    parameters = torch.zeros(0, 17, device="cuda")
    made = torch.ops.iic_dist.augment_views(*arguments(device="cuda", rows=empty, parameters=parameters))
    assert made.shape == (0, 3, 8, 8)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.iic_dist.augment_views.default, arguments(device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device() -> None:
    made = [torch.ops.iic_dist.augment_views(*arguments(device=f"cuda:{i}")) for i in range(2)]
    assert torch.equal(made[0].cpu(), made[1].cpu())
