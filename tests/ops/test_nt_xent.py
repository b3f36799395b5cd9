"""The NT-Xent loss and its native ops against a float64 cross-entropy over the masked matrix."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import measuring
import published
import pytest
import torch
from torch import Tensor

from iic_dist.losses import nt_xent_loss
from iic_dist.ops import backend, nt_xent

needs_fused = pytest.mark.skipif(nt_xent.FUSED is None, reason=backend.WHY_NOT_FUSED or "it has no NT-Xent kernels")
implementations = pytest.mark.parametrize("impl", ["torch", pytest.param("fused", marks=needs_fused)])

# Largest relative norm of the error by dtype of the embeddings, at temperature 0.5; float32 and float64 lose 1 /
# temperature of it, which magnifies the rounding of the similarities.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# N, D: multiples of nothing; one column; the borders of tiles (64 x 128), of groups of rows and of vectors.
SHAPES = [
    (2, 3),
    (5, 1),
    (7, 13),
    (8, 16),
    (31, 12),
    (33, 17),
    (63, 10),
    (65, 7),
    (127, 2),
    (129, 64),
    (255, 8),
    (257, 3),
    (300, 130),
    (520, 33),
]


def embeddings(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Second views that agree with the first ones in part, of various norms, float64."""
    generator = torch.Generator().manual_seed(seed)
    a, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return 3 * a, a + noise


def with_gradients(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    value = loss(a, b)
    return value.detach(), *torch.autograd.grad(1.5 * value, (a, b))


def assert_published(a: Tensor, b: Tensor, impl: str, temperature: float = 0.5) -> None:
    values = with_gradients(lambda a, b: nt_xent_loss(a, b, temperature=temperature, impl=impl), a, b)
    wanted = with_gradients(lambda a, b: published.nt_xent(a, b, temperature), a.double(), b.double())
    tolerance = TOLERANCE[a.dtype] * max(1.0, 0.5 / temperature)
    for value, want, dtype in zip(values, wanted, (None, a.dtype, b.dtype), strict=True):
        assert dtype in (None, value.dtype)
        assert value.shape == want.shape
        # What all but vanishes keeps the rounding of the terms that cancel in it: their size is 1 in the value and
        # 1 / (2N temperature norm) in each row of a gradient.
        size = 1.0 if dtype is None else float(1 / a.double().norm(dim=1).min()) / (2 * temperature * len(a) ** 0.5)
        assert (value.double() - want).norm() <= tolerance * max(size, want.norm())


@implementations
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_equals_published(n: int, d: int, dtype: torch.dtype, impl: str) -> None:
    assert_published(*(x.to(dtype) for x in embeddings(n, d)), impl)


@implementations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.005])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (40, 5), (300, 32)])
def test_small_temperatures(n: int, d: int, temperature: float, dtype: torch.dtype, impl: str) -> None:
    assert_published(*(x.to(dtype) for x in embeddings(n, d)), impl, temperature)


@implementations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.01, 0.005])
def test_identical_and_antipodal_rows(temperature: float, dtype: torch.dtype, impl: str) -> None:
    a, b = (x.to(dtype) for x in embeddings(300, 8))
    a[:150], b[:100] = a[0].clone(), a[0].clone()
    b[100:120] = -a[0]
    a[200:210], b[200:210] = -a[0], a[0].clone()
    assert_published(a, b, impl, temperature)


@implementations
@pytest.mark.parametrize("temperature", [0.5, 0.005])
def test_log_sum_exps_far_apart(temperature: float, impl: str) -> None:
    """A row whose neighbours are all its opposite beside rows that are all the same: lse differ by 2 / temperature."""
    a = torch.tensor([[1.0, 0.0]]).repeat(400, 1)
    b = a.clone()
    a[7] = -a[7]
    assert_published(a, b, impl, temperature)


@implementations
@pytest.mark.parametrize("n", [2, 5, 300])
def test_known_values(n: int, impl: str) -> None:
    same = torch.ones(n, 3)
    value, *gradients = with_gradients(lambda a, b: nt_xent_loss(a, b, impl=impl), same, same)
    torch.testing.assert_close(value, torch.tensor(math.log(2 * n - 1)))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros(n, 3), atol=1e-6, rtol=0)


@implementations
def test_a_zero_embedding_is_finite(impl: str) -> None:
    a, b = embeddings(20, 4)
    a[3] = 0
    value, *gradients = with_gradients(lambda a, b: nt_xent_loss(a, b, impl=impl), a, b)
    wanted = with_gradients(published.nt_xent, a, b)
    for left, right in zip((value, *gradients), wanted, strict=True):
        torch.testing.assert_close(left, right)


@implementations
def test_nan_comes_out(impl: str) -> None:
    a, b = (x.float() for x in embeddings(300, 5))
    b[290, 2] = math.nan
    for value in with_gradients(lambda a, b: nt_xent_loss(a, b, impl=impl), a, b):
        assert value.isnan().all()


@implementations
def test_strided_embeddings(impl: str) -> None:
    a, b = embeddings(70, 9)
    assert_published(a.T.contiguous().T, b.repeat_interleave(2, 0)[::2], impl)
    assert_published(a, b[:1].expand_as(b), impl)


@implementations
def test_gradcheck(impl: str) -> None:
    a, b = (x.requires_grad_() for x in embeddings(6, 4))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent_loss(a, b, temperature=0.3, impl=impl), (a, b))


@implementations
def test_compiles_whole(impl: str) -> None:
    a, b = (x.float() for x in embeddings(70, 9))
    compiled = torch.compile(lambda a, b: nt_xent_loss(a, b, impl=impl), fullgraph=True)
    eager = with_gradients(lambda a, b: nt_xent_loss(a, b, impl=impl), a, b)
    for value, wanted in zip(with_gradients(compiled, a, b), eager, strict=True):
        torch.testing.assert_close(value, wanted)


@implementations
def test_autocast_does_not_round_the_loss(impl: str) -> None:
    a, b = (x.float() for x in embeddings(70, 9))
    wanted = with_gradients(lambda a, b: nt_xent_loss(a, b, impl=impl), a, b)
    with torch.autocast("cpu", torch.bfloat16):
        values = with_gradients(lambda a, b: nt_xent_loss(a, b, impl=impl), a, b)
    for value, want in zip(values, wanted, strict=True):
        assert torch.equal(value, want)


@needs_fused
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("first_row", "num_rows"), [(0, 4), (30, 300), (300, 1200), (1498, 2), (0, 1500)])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_ops_on_a_rank_are_their_twins(first_row: int, num_rows: int, temperature: float, dtype: torch.dtype) -> None:
    assert nt_xent.FUSED is not None
    z = torch.nn.functional.normalize(torch.cat(embeddings(750, 11)), dim=1)
    all_lse, _ = nt_xent.nt_xent_rows(z, 0, 1500, temperature)
    rows, lse = z.to(dtype).T.contiguous().T, torch.stack([all_lse, all_lse], 1)[:, 1].to(dtype)
    place = (first_row, num_rows, temperature)
    fused = *nt_xent.FUSED.nt_xent_rows(rows, *place), nt_xent.FUSED.nt_xent_rows_grad(rows, lse, *place)
    twin = *nt_xent.nt_xent_rows(z, *place), nt_xent.nt_xent_rows_grad(z, all_lse, *place)
    for value, wanted in zip(fused, twin, strict=True):
        assert value.dtype == dtype
        assert value.shape == wanted.shape
        error = (value.double() - wanted).norm() / wanted.norm()
        assert error <= TOLERANCE[dtype] * max(1.0, 0.5 / temperature)


@needs_fused
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "d", "first_row", "num_rows"), [(2, 3, 0, 4), (300, 5, 100, 300)])
def test_opcheck(n: int, d: int, first_row: int, num_rows: int, dtype: torch.dtype) -> None:
    assert nt_xent.FUSED is not None
    z = torch.cat(embeddings(n, d)).to(dtype)
    torch.library.opcheck(nt_xent.FUSED.nt_xent_rows, (z, first_row, num_rows, 0.5))
    lse, _ = nt_xent.FUSED.nt_xent_rows(z, 0, 2 * n, 0.5)
    torch.library.opcheck(nt_xent.FUSED.nt_xent_rows_grad, (z, lse, first_row, num_rows, 0.5))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


THREADS = (2, 3, 4)


@needs_fused
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "d"), [(2, 1), (3, 130), (33, 400), (65, 129), (100, 3), (130, 128), (257, 1023), (700, 33), (1500, 128)]
)
def test_threads_do_not_change_a_bit(n: int, d: int, dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    """Intel's library, on AVX-512, rounded a product in another order inside of a parallel region than outside."""
    views = [x.to(dtype) for x in embeddings(n, d)]
    set_threads(1)
    wanted = with_gradients(lambda a, b: nt_xent_loss(a, b, impl="fused"), *views)
    for threads in THREADS:
        set_threads(threads)
        values = with_gradients(lambda a, b: nt_xent_loss(a, b, impl="fused"), *views)
        for value, want in zip(values, wanted, strict=True):
            assert torch.equal(value, want), threads


@needs_fused
@pytest.mark.parametrize(("first_row", "num_rows"), [(0, 1400), (300, 2), (300, 130), (1000, 400)])
def test_threads_do_not_change_a_bit_of_a_rank(
    first_row: int, num_rows: int, set_threads: Callable[[int], None]
) -> None:
    """A single block of rows runs outside of a parallel region whatever the number of threads, several do on one."""
    assert nt_xent.FUSED is not None
    z = torch.nn.functional.normalize(torch.cat(embeddings(700, 100)).float(), dim=1)
    all_lse, _ = nt_xent.nt_xent_rows(z, 0, 1400, 0.1)
    results = []
    for threads in (1, *THREADS):
        set_threads(threads)
        log_sum_exp, positive = nt_xent.FUSED.nt_xent_rows(z, first_row, num_rows, 0.1)
        grad = nt_xent.FUSED.nt_xent_rows_grad(z, all_lse, first_row, num_rows, 0.1)
        results.append(torch.cat([log_sum_exp, positive, grad.flatten()]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_threads_do_not_change_a_bit_around_the_ops(
    monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    """PyTorch adds 32768 values or more in as many parts as there are threads, and so took the mean over the rows."""
    given = nt_xent.Implementation(
        lambda z, first, count, temperature: (z[:, 0] + 8, z[:, 1].clone()),
        lambda z, log_sum_exp, first, count, temperature: z.flip(1),
    )
    monkeypatch.setattr(nt_xent, "implementation", lambda impl, device: given)
    for seed in range(5):
        a, b = (x.float() for x in embeddings(30000, 3, seed))
        results = []
        for threads in (1, *THREADS):
            set_threads(threads)
            results.append(with_gradients(nt_xent_loss, a, b))
        for values in zip(*results, strict=True):
            assert all(torch.equal(value, values[0]) for value in values)


@needs_fused
def test_no_product_is_a_librarys() -> None:
    """Its order of addition is its own affair, on each make of processor another: here it may decide no bit."""
    assert nt_xent.FUSED is not None
    z = torch.nn.functional.normalize(torch.cat(embeddings(300, 64)).float(), dim=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        log_sum_exp, _ = nt_xent.FUSED.nt_xent_rows(z, 0, 600, 0.5)
        nt_xent.FUSED.nt_xent_rows_grad(z, log_sum_exp, 0, 600, 0.5)
    called = {event.name for event in record.events()}
    assert {"iic_dist::nt_xent_rows", "iic_dist::nt_xent_rows_grad"} <= called
    assert not {name for name in called if name.startswith(("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul"))}


@needs_fused
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_every_instruction_set(capability: str, tmp_path: Path) -> None:
    """The choice is made once in a process: a fresh one for each."""
    program = (
        "import sys, torch; from iic_dist import _C; from iic_dist.losses import nt_xent_loss\n"
        "assert _C.build_info()['cpu_capability'] in (sys.argv[2].upper(), 'NO AVX')\n"
        "def run(a, b, temperature):\n"
        "    loss = nt_xent_loss(a.requires_grad_(), b.requires_grad_(), temperature=temperature, impl='fused')\n"
        "    return loss.detach(), *torch.autograd.grad(loss, (a, b))\n"
        "cases = torch.load(sys.argv[1])\n"
        "torch.set_num_threads(1)\n"
        "results = [run(*case) for case in cases]\n"
        "torch.set_num_threads(3)\n"
        "for case, one in zip(cases, results): assert all(map(torch.equal, run(*case), one)), 'threads change bits'\n"
        "torch.save(results, sys.argv[1])"
    )
    cases = [(*(x.float() for x in embeddings(n, 7)), t) for n in (2, 33, 300) for t in (0.5, 0.01)]
    torch.save(cases, tmp_path / "tensors.pt")
    environment = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "tensors.pt"), capability], env=environment, check=True
    )
    for (a, b, t), outputs in zip(cases, torch.load(tmp_path / "tensors.pt"), strict=True):
        a, b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
        loss = published.nt_xent(a, b, t)
        for value, wanted in zip(outputs, (loss.detach(), *torch.autograd.grad(loss, (a, b))), strict=True):
            assert (value - wanted).norm() <= 3e-6 * max(1.0, 0.5 / t) * max(1.0, wanted.norm())


@implementations
def test_memory_of_65536_rows_does_not_grow_with_their_square(impl: str) -> None:
    """The whole matrix is 16 GiB, and its slice for these 256 rows 64 MiB."""
    ops = nt_xent.implementation(impl, torch.device("cpu"))
    z = torch.nn.functional.normalize(torch.ones(65536, 128), dim=1)
    log_sum_exp = torch.full((65536,), math.log(65535) + 2)
    assert measuring.peak_mebibytes(lambda: ops.nt_xent_rows(z, 512, 256, 0.5), "cpu") < 24
    assert measuring.peak_mebibytes(lambda: (ops.nt_xent_rows_grad(z, log_sum_exp, 512, 256, 0.5),), "cpu") < 32


@implementations
def test_memory_of_the_loss_around_its_ops(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """65536 x 128 is 32 MiB: what surrounds the ops, which have a test of their own, may hold two such."""
    small = nt_xent.Implementation(
        lambda z, first, count, temperature: (z[:, 0].clone(), z[:, 0].clone()),
        lambda z, log_sum_exp, first, count, temperature: torch.ones_like(z),
    )
    monkeypatch.setattr(nt_xent, "implementation", lambda impl, device: small)
    a, b = (torch.ones(32768, 128, requires_grad=True) for _ in range(2))
    peak = measuring.peak_mebibytes(lambda: torch.autograd.grad(nt_xent_loss(a, b, impl=impl), (a, b)), "cpu")
    assert peak < 72


@implementations
def test_memory_of_a_whole_step(impl: str) -> None:
    """The matrix of 4096 x 4096 is 64 MiB, and the published form holds several."""
    a, b = (x.float() for x in embeddings(2048, 16))
    peak = measuring.peak_mebibytes(lambda: with_gradients(lambda a, b: nt_xent_loss(a, b, impl=impl), a, b), "cpu")
    assert peak < 32


@needs_fused
def test_ops_check_their_arguments() -> None:
    assert nt_xent.FUSED is not None
    z = torch.cat(embeddings(4, 3))
    lse, _ = nt_xent.FUSED.nt_xent_rows(z, 0, 8, 0.5)
    for wrong in [(z[0], 0, 2), (z[:, :0], 0, 2), (z.half(), 0, 2), (z, 0, 3), (z, 6, 4), (z, -2, 4), (z, 0, 0)]:
        with pytest.raises(ValueError, match="z |rows "):
            nt_xent.FUSED.nt_xent_rows(*wrong, 0.5)
    with pytest.raises(ValueError, match="temperature=0"):
        nt_xent.FUSED.nt_xent_rows(z, 0, 8, 0.0)
    for wrong_lse in (lse[:-1], lse.float(), lse[:, None]):
        with pytest.raises(ValueError, match="log_sum_exp"):
            nt_xent.FUSED.nt_xent_rows_grad(z, wrong_lse, 0, 8, 0.5)


def test_a_device_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older build may lack these ops where it has others."""
    monkeypatch.setattr(backend, "WHY_NOT_FUSED", None)
    monkeypatch.setattr(backend, "FUSED_DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(nt_xent, "DEVICES", frozenset({"cpu"}))
    cuda = torch.device("cuda")
    assert nt_xent.implementation("auto", cuda) is nt_xent.TORCH
    with pytest.raises(RuntimeError, match=r"nt_xent for cpu, not cuda"):
        nt_xent.implementation("fused", cuda)
    assert backend.choose("auto", "cuda") == "fused"


@needs_fused
def test_devices_are_those_with_registered_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FUSED_DEVICES", frozenset({"cpu", "xpu"}))
    assert backend.devices_of("nt_xent_rows", "nt_xent_rows_grad") == {"cpu"}
    assert backend.devices_of("nt_xent_rows", "an_op_of_tomorrow") == frozenset()
