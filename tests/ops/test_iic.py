"""The IIC loss and its native ops against the published formula in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import published
import pytest
import torch
from torch import Tensor

from iic_dist.losses import IICTerms, iic_loss
from iic_dist.ops import backend, iic

fused = pytest.param(
    "fused", marks=pytest.mark.skipif(backend.WHY_NOT_FUSED is not None, reason=str(backend.WHY_NOT_FUSED))
)
needs_fused = fused.marks[0]
implementations = pytest.mark.parametrize("impl", ["torch", fused])
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
            ],
        ),
    ],
)

# Largest relative norm of the error by dtype of the logits; the cancellation in g - <z, g> sets it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# N, H, K, R: multiples of nothing; one sample; one cluster; the borders of panels, tiles and chunks.
SHAPES = [
    (1, 1, 2, 1),
    (1, 2, 7, 5),
    (5, 2, 1, 1),
    (7, 3, 3, 2),
    (33, 2, 4, 1),
    (256, 5, 10, 1),
    (63, 2, 11, 3),
    (65, 1, 16, 1),
    (700, 2, 17, 2),
    (1100, 1, 33, 1),
    (129, 2, 70, 4),
    (513, 1, 101, 1),
    (97, 1, 112, 2),
    (45, 2, 150, 2),
    (100, 1, 162, 2),
    (66, 1, 331, 1),
    (20, 1, 1000, 1),
]


def logits(n: int, h: int, k: int, repeats: int = 1, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Second views that agree with the first ones in part, float64."""
    generator = torch.Generator().manual_seed(seed)
    a = scale * torch.randn(n, h, k, generator=generator, dtype=torch.float64)
    noise = scale * torch.randn(repeats, n, h, k, generator=generator, dtype=torch.float64)
    return a, (a + noise / 2).flatten(0, 1)


def with_gradients(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The (H,) losses and the gradients of their sum, weighted differently for each sub-head."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    value = loss(a, b)
    weights = torch.linspace(0.5, 2.0, value.shape[0], dtype=value.dtype, device=value.device)
    return value.detach(), *torch.autograd.grad((value * weights).sum(), (a, b))


def error(value: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    difference = value.double().cpu() - expected.double().cpu()
    return float(difference.norm() / expected.double().norm().clamp_min(floor).cpu())


def assert_published(a: Tensor, b: Tensor, impl: str, entropy_weight: float = 1.0) -> None:
    value, *gradients = with_gradients(lambda a, b: iic_loss(a, b, entropy_weight=entropy_weight, impl=impl).loss, a, b)
    wanted, *wanted_gradients = with_gradients(
        lambda a, b: published.iic(a, b, entropy_weight), a.double().cpu(), b.double().cpu()
    )
    tolerance = TOLERANCE[a.dtype]
    # The mutual information of a single pair is the small difference of logarithms: their size is the scale.
    assert error(value, wanted, floor=math.log(max(2, a.shape[2]))) <= tolerance
    for gradient, logit, wanted_gradient in zip(gradients, (a, b), wanted_gradients, strict=True):
        assert gradient.shape == logit.shape
        assert gradient.dtype == a.dtype
        assert error(gradient, wanted_gradient) <= tolerance


@devices
@implementations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "h", "k", "repeats"), SHAPES)
def test_equals_published(n: int, h: int, k: int, repeats: int, dtype: torch.dtype, impl: str, device: str) -> None:
    a, b = (x.to(device, dtype) for x in logits(n, h, k, repeats))
    assert_published(a, b, impl, entropy_weight=1.5)


@implementations
@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 5])
def test_repeats(repeats: int, impl: str) -> None:
    a, b = (x.float() for x in logits(40, 2, 6, repeats))
    assert_published(a, b, impl)


def permuted(x: Tensor) -> Tensor:
    return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def with_gaps(x: Tensor) -> Tensor:
    wide = torch.full((2 * x.shape[0], x.shape[1] + 1, 2 * x.shape[2]), math.nan, dtype=x.dtype, device=x.device)
    wide[::2, 1:, ::2] = x
    return wide[::2, 1:, ::2]


def cut_from_rows(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0], x.shape[1], x.shape[2] + 3), math.nan, dtype=x.dtype, device=x.device)
    wide[..., 2:-1] = x
    return wide[..., 2:-1]


@devices
@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [permuted, with_gaps, cut_from_rows])
@pytest.mark.parametrize("k", [5, 20, 70, 170])
def test_strided_logits(k: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, impl: str, device: str) -> None:
    a, b = (layout(x.to(device, dtype)) for x in logits(70, 3, k, 2))
    assert not a.is_contiguous()
    assert_published(a, b, impl)


@devices
@implementations
def test_expanded_logits(impl: str, device: str) -> None:
    a, b = (x.to(device, torch.float32) for x in logits(66, 4, 18))
    assert_published(a[:, :1].expand_as(a), b, impl)
    for views in [
        (a[:1].expand_as(a), b),
        (a, b[..., :1].expand_as(b)),
    ]:  # no information: gradients are noise
        expanded = with_gradients(lambda a, b: iic_loss(a, b, impl=impl).loss, *views)
        copied = with_gradients(lambda a, b: iic_loss(a, b, impl=impl).loss, *(x.contiguous() for x in views))
        for left, right in zip(expanded, copied, strict=True):
            torch.testing.assert_close(left, right)


@devices
@implementations
@pytest.mark.parametrize("k", [2, 10, 70, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_saturated_logits_and_dead_clusters(k: int, dtype: torch.dtype, impl: str, device: str) -> None:
    a = torch.full((80, 2, k), -1e4, dtype=dtype, device=device)
    a[torch.arange(80), :, torch.arange(80) % max(1, k // 2)] = 1e4
    value, *gradients = with_gradients(lambda a, b: iic_loss(a, b, impl=impl).loss, a, a.clone())
    wanted = published.iic(a.double(), a.double())
    assert error(value, wanted, floor=1.0) <= TOLERANCE[dtype]
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@devices
@implementations
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("k", [2, 10, 70, 200])
def test_nan_comes_out_of_its_sub_head(k: int, value: float, impl: str, device: str) -> None:
    a, b = (x.to(device, torch.float32) for x in logits(70, 3, k))
    b[66, 1, k - 1] = value
    loss, *gradients = with_gradients(lambda a, b: iic_loss(a, b, impl=impl).loss, a, b)
    assert loss.isnan().tolist() == [False, True, False]
    for gradient in gradients:
        assert gradient[:, 1].isnan().all()
        assert not gradient[:, ::2].isnan().any()


@devices
@implementations
@pytest.mark.parametrize("k", [3, 10, 70, 200])
def test_minus_infinity_is_probability_zero(k: int, impl: str, device: str) -> None:
    a, b = (x.to(device, torch.float32) for x in logits(70, 2, k))
    a[:, :, 1] = b[3:5, 0, 2] = -math.inf
    assert_published(a, b, impl)
    a[7, 0] = -math.inf  # nothing is possible: NaN, as softmax says
    assert iic_loss(a, b, impl=impl).loss.isnan().tolist() == [True, False]


@devices
@implementations
@pytest.mark.parametrize("k", [2, 5, 10, 32, 70])
def test_known_values(k: int, impl: str, device: str) -> None:
    same = torch.eye(k, device=device).mul(200).repeat(4, 1).unsqueeze(1)
    agree = iic_loss(same, same, impl=impl)
    log_k = torch.tensor([math.log(k)], device=device)
    torch.testing.assert_close(agree.loss, -log_k)
    torch.testing.assert_close(agree.entropy, log_k)
    torch.testing.assert_close(agree.conditional_entropy, torch.zeros_like(log_k), atol=1e-5, rtol=0)
    uniform = torch.zeros(9, 1, k, device=device)
    none = iic_loss(uniform, uniform, impl=impl)
    torch.testing.assert_close(none.loss, torch.zeros_like(log_k), atol=1e-6, rtol=0)
    torch.testing.assert_close(none.joint, torch.full_like(none.joint, k**-2.0))


@implementations
def test_swapping_views_and_relabelling_change_nothing(impl: str) -> None:
    a, b = logits(50, 2, 9)
    labels = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    loss = iic_loss(a, b, impl=impl).loss
    torch.testing.assert_close(iic_loss(b, a, impl=impl).loss, loss)
    torch.testing.assert_close(iic_loss(a[..., labels], b[..., labels], impl=impl).loss, loss)


@devices
@implementations
def test_gradcheck(impl: str, device: str) -> None:
    a, b = (x.to(device).requires_grad_() for x in logits(6, 2, 4, 2))
    assert torch.autograd.gradcheck(lambda a, b: iic_loss(a, b, entropy_weight=2.0, impl=impl).loss, (a, b))


@devices
@needs_fused
@pytest.mark.parametrize("k", [2, 10, 45, 70, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fused_gives_the_numbers_of_torch(k: int, dtype: torch.dtype, device: str) -> None:
    """The fallback is the same loss to 1e-6, in every term."""
    a, b = (x.to(device, dtype) for x in logits(150, 3, k, 2))
    both = [iic_loss(a, b, entropy_weight=1.5, impl=impl) for impl in ("fused", "torch")]
    for name, fused_term, torch_term in zip(IICTerms._fields, *both, strict=True):
        assert fused_term.dtype == dtype
        assert error(fused_term, torch_term) <= (2e-6 if "information" in name else 1e-6), name


@devices
@needs_fused
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "h", "k", "repeats"), [(5, 2, 3, 2), (70, 1, 70, 1), (65, 1, 200, 2)])
def test_opcheck(n: int, h: int, k: int, repeats: int, dtype: torch.dtype, device: str) -> None:
    assert iic.FUSED is not None
    a, b = (x.to(device, dtype) for x in logits(n, h, k, repeats))
    torch.library.opcheck(iic.FUSED.iic_joint, (a, b))
    sums, *kept = iic.FUSED.iic_joint(a, b)
    torch.library.opcheck(iic.FUSED.iic_information, (sums, k, 1.5))
    *terms, joint_grad = iic.FUSED.iic_information(sums, k, 1.5)
    torch.library.opcheck(iic.FUSED.iic_logits_grad, (a, b, *kept, joint_grad, terms[0]))


@devices
@implementations
@pytest.mark.parametrize("k", [10, 70])
def test_compiles_whole(k: int, impl: str, device: str) -> None:
    a, b = (x.to(device, torch.float32) for x in logits(70, 2, k))
    compiled = torch.compile(lambda a, b: iic_loss(a, b, impl=impl).loss, fullgraph=True)
    eager = with_gradients(lambda a, b: iic_loss(a, b, impl=impl).loss, a, b)
    for value, wanted in zip(with_gradients(compiled, a, b), eager, strict=True):
        assert error(value, wanted) <= 1e-5


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_fused
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "k", "repeats"),
    [(70, 1, 2), (5000, 2, 1), (2000, 3, 3), (2100, 4, 1), (3000, 10, 1), (1500, 70, 2), (600, 300, 1), (100, 1000, 1)],
)
def test_threads_do_not_change_a_bit(
    n: int, k: int, repeats: int, dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    """Sums of chunks that follow the number of threads, or a library's products, would add in another order."""
    views = [x.to(dtype) for x in logits(n, 3, k, repeats)]
    set_threads(1)
    wanted = with_gradients(lambda a, b: iic_loss(a, b, impl="fused").loss, *views)
    for threads in (2, 3, 4):
        set_threads(threads)
        values = with_gradients(lambda a, b: iic_loss(a, b, impl="fused").loss, *views)
        for value, want in zip(values, wanted, strict=True):
            assert torch.equal(value, want), threads


@needs_fused
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_every_instruction_set(capability: str, tmp_path: Path) -> None:
    """The choice is made once in a process: a fresh one for each."""
    program = (
        "import sys, torch; from iic_dist import _C; from iic_dist.losses import iic_loss\n"
        "assert _C.build_info()['cpu_capability'] in (sys.argv[2].upper(), 'NO AVX')\n"
        "def run(a, b):\n"
        "    loss = iic_loss(a.requires_grad_(), b.requires_grad_(), impl='fused').loss\n"
        "    return loss.detach(), *torch.autograd.grad(loss.sum(), (a, b))\n"
        "cases = torch.load(sys.argv[1])\n"
        "torch.set_num_threads(1)\n"
        "results = [run(*case) for case in cases]\n"
        "torch.set_num_threads(3)\n"
        "for case, one in zip(cases, results): assert all(map(torch.equal, run(*case), one)), 'threads change bits'\n"
        "torch.save(results, sys.argv[1])"
    )
    inputs = [tuple(x.float() for x in logits(200, 1, k, 2)) for k in (1, 2, 3, 4, 5, 11, 70)]
    torch.save(inputs, tmp_path / "tensors.pt")
    environment = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    command = [sys.executable, "-c", program, str(tmp_path / "tensors.pt"), capability]
    subprocess.run(command, env=environment, check=True)
    for (a, b), outputs in zip(inputs, torch.load(tmp_path / "tensors.pt"), strict=True):
        a, b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
        loss = published.iic(a, b)
        for value, wanted in zip(outputs, (loss.detach(), *torch.autograd.grad(loss.sum(), (a, b))), strict=True):
            assert error(value, wanted, floor=1e-6) <= 3e-5


@implementations
def test_wrong_logits_are_named(impl: str) -> None:
    a, b = logits(6, 2, 4)
    with pytest.raises(ValueError, match="empty batch"):
        iic_loss(a[:0], b[:0], impl=impl)
    with pytest.raises(ValueError, match=r"\(6, 2, 4\) and logits_b \(5, 2, 4\)"):
        iic_loss(a, b[:5], impl=impl)
    with pytest.raises(ValueError, match="one floating dtype"):
        iic_loss(a, b.float(), impl=impl)
    with pytest.raises(ValueError, match="must be one of"):
        iic_loss(a, b, impl="fast")


@needs_fused
def test_ops_check_their_arguments() -> None:
    assert iic.FUSED is not None
    a, b = logits(6, 2, 4)
    for wrong in [(a[:0], b[:0]), (a, b[:5]), (a, b.float()), (a[0], b[0]), (a, b[..., :3])]:
        with pytest.raises(ValueError, match="logits_a"):
            iic.FUSED.iic_joint(*wrong)
    sums, *kept = iic.FUSED.iic_joint(a, b)
    with pytest.raises(ValueError, match=r"H\*K\*K \+ 1"):
        iic.FUSED.iic_information(sums[:-1], 4, 1.0)
    joint_grad, grad_loss = torch.zeros(2, 4, 4).double(), torch.ones(2).double()
    right = (*kept, joint_grad, grad_loss)
    for wrong in [(kept[0], *kept), (*kept, joint_grad[:1]), (*kept, joint_grad, grad_loss.float())]:
        with pytest.raises(ValueError, match=r"probs_|joint_grad|grad_loss"):
            iic.FUSED.iic_logits_grad(a, b, *wrong, *right[len(wrong) :])
