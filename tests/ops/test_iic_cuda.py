"""What only a GPU can show of the IIC loss: no wait for the host, graphs, repeatability, the second device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iic_dist.losses import iic_loss
from iic_dist.ops import backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif("cuda" not in backend.FUSED_DEVICES, reason="the extension has no CUDA kernels"),
    pytest.mark.parametrize("k", [10, 70, 200]),  # one of each kernel family
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str),
]


def views(k: int, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, noise = 2 * torch.randn(2, 300, 3, k, generator=generator)
    return [x.to(device, dtype).requires_grad_() for x in (a, a + noise / 2)]


def step(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    terms = iic_loss(*inputs, impl="fused")
    return terms.loss.detach(), terms.joint, *torch.autograd.grad(terms.loss.sum(), inputs)


def test_a_step_never_waits_for_the_host(k: int, dtype: torch.dtype) -> None:
    inputs = views(k, dtype, "cuda")
    step(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = step(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.isfinite().all() for result in results)


def test_a_step_is_repeatable_bit_for_bit(k: int, dtype: torch.dtype) -> None:
    inputs = views(k, dtype, "cuda")
    first = step(inputs)
    for _ in range(5):
        assert all(torch.equal(old, new) for old, new in zip(first, step(inputs), strict=True))


def test_a_graph_replays_on_new_logits(k: int, dtype: torch.dtype) -> None:
    inputs = views(k, dtype, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs)
    others = views(k, dtype, "cuda", seed=1)
    with torch.no_grad():
        for static, other in zip(inputs, others, strict=True):
            static.copy_(other)
    graph.replay()
    assert all(torch.equal(replayed, eager) for replayed, eager in zip(captured, step(others), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device_gives_what_the_first_gives(k: int, dtype: torch.dtype) -> None:
    on_first = step(views(k, dtype, "cuda:0"))
    on_second = step(views(k, dtype, "cuda:1"))  # the current device is still the first
    for first, second in zip(on_first, on_second, strict=True):
        assert second.device == torch.device("cuda", 1)
        torch.testing.assert_close(second.cpu(), first.cpu())
