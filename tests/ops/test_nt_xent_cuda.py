"""The NT-Xent kernels of a GPU: parity with float64, graphs, no wait for the host, repeatability, the second device."""

from __future__ import annotations

import math

import measuring
import published
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iic_dist.losses import nt_xent_loss
from iic_dist.ops import nt_xent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif("cuda" not in nt_xent.DEVICES, reason="the extension has no CUDA kernels of NT-Xent"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# As in test_nt_xent.py: largest relative norm of the error at temperature 0.5; all but the 16-bit ones lose 1 /
# temperature of it, and these the rounding of z, which does the same.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# N, D: multiples of nothing; the borders of tiles and of blocks of rows; each shape of block, and one or two chunks of
# 128 features; longer rows than the kernels take.
SHAPES = [(2, 3), (5, 1), (33, 17), (64, 16), (128, 128), (129, 64), (700, 130), (257, 256), (150, 300), (130, 512)]
LONG_ROWS = [(40, 513), (70, 1000)]


def embeddings(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Second views that agree with the first ones in part, of various norms, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    a, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return (3 * a).to(dtype), (a + noise).to(dtype)


def step(a: Tensor, b: Tensor, temperature: float = 0.5) -> tuple[Tensor, ...]:
    """Forward and backward of N times the loss on the GPU: gradients of the mean are too small for float16."""
    a, b = (x.detach().cuda().requires_grad_() for x in (a, b))
    loss = nt_xent_loss(a, b, temperature=temperature, impl="fused")
    return loss.detach(), *torch.autograd.grad(len(a) * loss, (a, b))


def assert_published(a: Tensor, b: Tensor, temperature: float = 0.5) -> None:
    values = step(a, b, temperature)
    doubles = [x.double().requires_grad_() for x in (a, b)]
    loss = published.nt_xent(*doubles, temperature)
    tolerance = TOLERANCE[a.dtype] * max(1.0, 0.5 / temperature)
    for value, want in zip(values, (loss.detach(), *torch.autograd.grad(len(a) * loss, doubles)), strict=True):
        assert value.shape == want.shape
        # What all but vanishes keeps the rounding of the terms that cancel in it.
        size = float(1 / a.double().norm(dim=1).min()) / (2 * temperature) * len(a) ** 0.5 if want.dim() else 1.0
        assert (value.cpu().double() - want).norm() <= tolerance * max(size, want.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "d"), [*SHAPES, *LONG_ROWS])
def test_equals_published(n: int, d: int, dtype: torch.dtype) -> None:
    assert_published(*embeddings(n, d, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.005])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (300, 32)])
def test_small_temperatures(n: int, d: int, temperature: float, dtype: torch.dtype) -> None:
    assert_published(*embeddings(n, d, dtype), temperature)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.005])
def test_log_sum_exps_far_apart(temperature: float, dtype: torch.dtype) -> None:
    """Rows of which all others are the opposite beside rows that are all the same: one exponential is not enough."""
    a = torch.tensor([[1.0, 0.0]], dtype=dtype).repeat(400, 1)
    b = a.clone()
    a[7] = -a[7]
    assert_published(a, b, temperature)


@dtypes
@pytest.mark.parametrize("n", [2, 300])
def test_identical_embeddings(n: int, dtype: torch.dtype) -> None:
    value, *gradients = step(*torch.ones(2, n, 40, dtype=dtype))
    torch.testing.assert_close(value.cpu(), torch.tensor(math.log(2 * n - 1)))
    for gradient in gradients:
        torch.testing.assert_close(gradient.cpu(), torch.zeros(n, 40, dtype=dtype), atol=1e-5 * n, rtol=0)


@dtypes
def test_nan_comes_out(dtype: torch.dtype) -> None:
    a, b = embeddings(300, 5, dtype)
    b[290, 2] = math.nan
    assert all(value.isnan().all() for value in step(a, b))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("d", [11, 144, 600])
@pytest.mark.parametrize(("first_row", "num_rows"), [(0, 4), (30, 300), (300, 1200), (1498, 2), (0, 1500)])
def test_ops_on_a_rank_are_their_twins(first_row: int, num_rows: int, d: int, dtype: torch.dtype) -> None:
    """Any shard of the rows; z not contiguous, the log-sum-exps strided."""
    assert nt_xent.FUSED is not None
    z = F.normalize(torch.cat(embeddings(750, d)), dim=1).to(dtype)
    place = (first_row, num_rows, 0.1)
    exact = z.double()
    all_lse, _ = nt_xent.nt_xent_rows(exact, 0, 1500, 0.1)
    wanted = *nt_xent.nt_xent_rows(exact, *place), nt_xent.nt_xent_rows_grad(exact, all_lse, *place)
    rows = z.cuda().T.contiguous().T
    result = torch.promote_types(dtype, torch.float32)
    lse = torch.stack([all_lse, all_lse], 1)[:, 1].to("cuda", result)
    fused = *nt_xent.FUSED.nt_xent_rows(rows, *place), nt_xent.FUSED.nt_xent_rows_grad(rows, lse, *place)
    for value, want in zip(fused, wanted, strict=True):
        assert (value.dtype, value.shape) == (result, want.shape)
        assert (value.cpu().double() - want).norm() <= TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "d", "first_row", "num_rows"), [(2, 3, 0, 4), (300, 40, 100, 300)])
def test_opcheck(n: int, d: int, first_row: int, num_rows: int, dtype: torch.dtype) -> None:
    assert nt_xent.FUSED is not None
    z = torch.cat(embeddings(n, d, dtype)).cuda()
    torch.library.opcheck(nt_xent.FUSED.nt_xent_rows, (z, first_row, num_rows, 0.5))
    lse, _ = nt_xent.FUSED.nt_xent_rows(z, 0, 2 * n, 0.5)
    torch.library.opcheck(nt_xent.FUSED.nt_xent_rows_grad, (z, lse, first_row, num_rows, 0.5))


def on_gpu(n: int, d: int, dtype: torch.dtype, device: str = "cuda", seed: int = 0) -> list[Tensor]:
    return [x.to(device).requires_grad_() for x in embeddings(n, d, dtype, seed)]


def fused_step(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    loss = nt_xent_loss(*inputs, temperature=0.1, impl="fused")
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@dtypes
@pytest.mark.parametrize("d", [128, 600])
def test_a_step_never_waits_for_the_host(d: int, dtype: torch.dtype) -> None:
    inputs = on_gpu(700, d, dtype)
    fused_step(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = fused_step(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.isfinite().all() for result in results)


@dtypes
@pytest.mark.parametrize("n", [700, 9000])  # with and without splits of the columns
def test_a_step_is_repeatable_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    inputs = on_gpu(n, 128, dtype)
    first = fused_step(inputs)
    for _ in range(5):
        assert all(torch.equal(old, new) for old, new in zip(first, fused_step(inputs), strict=True))


@dtypes
@pytest.mark.parametrize("d", [128, 600])
def test_a_graph_replays_on_new_embeddings(d: int, dtype: torch.dtype) -> None:
    inputs = on_gpu(300, d, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fused_step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused_step(inputs)
    others = on_gpu(300, d, dtype, seed=1)
    with torch.no_grad():
        for static, other in zip(inputs, others, strict=True):
            static.copy_(other)
    graph.replay()
    assert all(torch.equal(replayed, eager) for replayed, eager in zip(captured, fused_step(others), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@dtypes
def test_the_second_device_gives_what_the_first_gives(dtype: torch.dtype) -> None:
    on_first = fused_step(on_gpu(300, 128, dtype, "cuda:0"))
    on_second = fused_step(on_gpu(300, 128, dtype, "cuda:1"))  # the current device is still the first
    for first, second in zip(on_first, on_second, strict=True):
        assert second.device == torch.device("cuda", 1)
        torch.testing.assert_close(second.cpu(), first.cpu())


@dtypes
def test_memory_of_65536_rows(dtype: torch.dtype) -> None:
    """The whole matrix is 16 GiB in float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(32768, 128, generator=generator, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    fused_step([a, b])
    assert measuring.peak_mebibytes(lambda: fused_step([a, b]), "cuda") < 128


@dtypes
def test_auto_takes_the_kernels(dtype: torch.dtype) -> None:
    inputs = on_gpu(70, 33, dtype)
    auto = nt_xent_loss(*inputs, temperature=0.1)
    assert torch.equal(auto.detach(), fused_step(inputs)[0])
