"""The losses against their published form in float64, on one rank and on several."""

from __future__ import annotations

import math
from collections.abc import Callable

import published
import pytest
import rank_tasks
import torch
from ranks import Ranks
from torch import Tensor

from iic_dist.losses import iic_loss, nt_xent_loss
from iic_dist.ops import backend

# Largest relative norm of the error by dtype of the input; the cancellation in g - <z, g> sets that of gradients.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


IMPLEMENTATIONS = [
    "torch",
    pytest.param(
        "fused", marks=pytest.mark.skipif(backend.WHY_NOT_FUSED is not None, reason=str(backend.WHY_NOT_FUSED))
    ),
]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


def logits(n: int, h: int, k: int, repeats: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = 2 * torch.randn(n, h, k, generator=generator, dtype=torch.float64)
    noise = torch.randn(repeats, n, h, k, generator=generator, dtype=torch.float64)
    return [a.to(dtype), (a + noise).flatten(0, 1).to(dtype)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "h", "k", "repeats"), [(1, 1, 2, 1), (7, 3, 5, 2), (64, 5, 10, 3), (50, 2, 70, 1)])
def test_iic_equals_the_published_loss(n: int, h: int, k: int, repeats: int, dtype: torch.dtype) -> None:
    inputs = logits(n, h, k, repeats, dtype=dtype)
    upstream = torch.linspace(0.5, 2, h, dtype=torch.float64)
    for weight in (1.0, 2.0):
        value, gradients = with_gradients(
            lambda a, b, w=weight: (iic_loss(a, b, entropy_weight=w, impl="torch").loss.double() * upstream).sum(),
            *inputs,
        )
        expected, expected_gradients = with_gradients(
            lambda a, b, w=weight: (published.iic(a, b, w) * upstream).sum(), *(x.double() for x in inputs)
        )
        # A joint of two float64 products cancels to nothing for K = 2 and N = 1; there the scale is that of ln K.
        assert abs(value - expected) <= TOLERANCE[dtype] * max(abs(expected), math.log(k))
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            assert gradient.dtype == dtype
            assert relative_error(gradient, wanted) <= TOLERANCE[dtype]


def test_iic_terms_are_those_of_information_theory() -> None:
    a, b = logits(40, 2, 6, 1)
    terms = iic_loss(a, b)
    joint = torch.einsum("nhi,nhj->hij", a.softmax(2), b.softmax(2)) / 40
    joint = (joint + joint.transpose(1, 2)) / 2
    marginal = joint.sum(2)
    entropy = torch.special.entr(marginal).sum(1)
    information = 2 * entropy - torch.special.entr(joint).sum((1, 2))
    torch.testing.assert_close(terms.joint, joint)
    torch.testing.assert_close(terms.entropy, entropy)
    torch.testing.assert_close(terms.mutual_information, information)
    torch.testing.assert_close(terms.conditional_entropy, entropy - information)
    torch.testing.assert_close(terms.loss, -information)


def test_only_the_loss_carries_a_gradient() -> None:
    a, b = logits(4, 2, 3, 1)
    terms = iic_loss(a.requires_grad_(), b)
    assert terms.loss.requires_grad
    assert not any(term.requires_grad for term in terms[1:])


@pytest.mark.parametrize("k", [2, 10, 70])
def test_iic_of_balanced_one_hot_agreement_is_minus_ln_k(k: int) -> None:
    one_hot = 1e4 * torch.eye(k).unsqueeze(1)
    terms = iic_loss(one_hot, one_hot)
    torch.testing.assert_close(terms.loss, torch.tensor([-math.log(k)]))
    torch.testing.assert_close(terms.conditional_entropy, torch.zeros(1), atol=1e-5, rtol=0)


def test_iic_of_independent_uniform_assignments_is_zero() -> None:
    first = 1e4 * torch.eye(5).repeat_interleave(5, 0).unsqueeze(1)
    second = 1e4 * torch.eye(5).repeat(5, 1).unsqueeze(1)
    torch.testing.assert_close(iic_loss(first, second).loss, torch.zeros(1), atol=1e-6, rtol=0)


def test_iic_does_not_depend_on_the_order_of_views_or_the_names_of_clusters() -> None:
    a, b = logits(30, 2, 7, 1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    loss = iic_loss(a, b).loss
    torch.testing.assert_close(iic_loss(b, a).loss, loss)
    torch.testing.assert_close(iic_loss(a[..., order], b[..., order]).loss, loss)


def test_iic_with_repeats_equals_that_many_copies_of_the_first_view() -> None:
    a, b = logits(9, 2, 4, 3)
    torch.testing.assert_close(iic_loss(a, b).loss, iic_loss(a.repeat(3, 1, 1), b).loss)


def test_saturated_dead_and_infinite_logits_stay_finite() -> None:
    a, b = (1e4 * x for x in logits(20, 1, 5, 1, dtype=torch.float32))
    a[..., 0] = b[..., 0] = -torch.inf  # a dead cluster
    value, gradients = with_gradients(lambda a, b: iic_loss(a, b).loss.sum(), a, b)
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_nan_logits_give_a_nan_loss() -> None:
    a, b = logits(20, 2, 5, 1)
    a[3, 0, 2] = torch.nan
    loss = iic_loss(a, b).loss
    assert loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("n", "h", "k", "repeats"), [(7, 3, 5, 2), (64, 5, 10, 3), (50, 2, 70, 1)])
def test_iic_with_a_prior_equals_the_divergence_from_it(
    n: int, h: int, k: int, repeats: int, dtype: torch.dtype, impl: str
) -> None:
    inputs = logits(n, h, k, repeats, dtype=dtype)
    sizes = torch.arange(1, k + 1, dtype=torch.float64)
    upstream = torch.linspace(0.5, 2, h, dtype=torch.float64)
    for weight in (0.7, 1.0, 2.0):
        value, gradients = with_gradients(
            lambda a, b, w=weight: (
                iic_loss(a, b, entropy_weight=w, prior=sizes, impl=impl).loss.double() * upstream
            ).sum(),
            *inputs,
        )
        expected, expected_gradients = with_gradients(
            lambda a, b, w=weight: (published.iic(a, b, w, sizes) * upstream).sum(), *(x.double() for x in inputs)
        )
        assert abs(value - expected) <= TOLERANCE[dtype] * max(abs(expected), math.log(k))
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            assert relative_error(gradient, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_prior_of_equal_sizes_changes_nothing(impl: str) -> None:
    inputs = logits(20, 2, 5, 2)
    equal = torch.full((5,), 3.0)
    for weight in (1.0, 2.0):
        plain = with_gradients(lambda a, b, w=weight: iic_loss(a, b, entropy_weight=w, impl=impl).loss.sum(), *inputs)
        prior = with_gradients(
            lambda a, b, w=weight: iic_loss(a, b, entropy_weight=w, prior=equal, impl=impl).loss.sum(), *inputs
        )
        torch.testing.assert_close(prior, plain, rtol=1e-13, atol=1e-15)


def test_the_lowest_loss_has_the_sizes_of_the_prior() -> None:
    """Agreement with certainty and clusters of these sizes: -(2w - 1) ln K, as with equal sizes; else more."""
    sizes, weight = torch.tensor([1.0, 2, 5]), 1.5

    def loss(counts: list[int]) -> float:
        one_hot = 1e4 * torch.eye(3, dtype=torch.float64).repeat_interleave(torch.tensor(counts), 0).unsqueeze(1)
        return iic_loss(one_hot, one_hot, entropy_weight=weight, prior=sizes).loss.item()

    assert loss([10, 20, 50]) == pytest.approx(-2 * math.log(3))
    for other in ([27, 27, 26], [50, 20, 10], [11, 20, 49], [0, 0, 80]):
        assert loss(other) > loss([10, 20, 50]) + 1e-4


def test_a_prior_must_have_a_size_for_each_cluster() -> None:
    with pytest.raises(ValueError, match=r"prior \(4,\) for 5 clusters"):
        iic_loss(*logits(6, 1, 5, 1), prior=torch.ones(4))


def test_autocast_does_not_round_the_loss() -> None:
    inputs = [x.requires_grad_() for x in logits(40, 2, 30, 2, dtype=torch.float32)]

    def step() -> tuple[Tensor, ...]:
        loss = iic_loss(*inputs, impl="torch").loss
        return loss.detach(), *torch.autograd.grad(loss.sum(), inputs)

    outside = step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = step()
    for one, other in zip(outside, inside, strict=True):
        assert torch.equal(one, other)


def test_iic_gradient_by_finite_differences() -> None:
    inputs = [x.requires_grad_() for x in logits(5, 2, 3, 2)]
    assert torch.autograd.gradcheck(lambda a, b: iic_loss(a, b, entropy_weight=1.3).loss, inputs)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (torch.ones(4, 3), torch.ones(4, 3), r"\(4, 3\).*must be \(N, H, K\)"),
        (torch.ones(4, 1, 3), torch.ones(4, 1, 2), r"\(4, 1, 2\).*must be"),
        (torch.ones(4, 1, 3), torch.ones(6, 1, 3), r"\(6, 1, 3\).*whole multiple"),
        (torch.ones(0, 1, 3), torch.ones(0, 1, 3), "empty batch"),
        (torch.ones(4, 1, 3), torch.ones(4, 1, 3).double(), "float64.*one floating dtype"),
        (torch.ones(4, 1, 3).long(), torch.ones(4, 1, 3).long(), "int64.*one floating dtype"),
    ],
)
def test_iic_names_what_is_wrong(a: Tensor, b: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        iic_loss(a, b)


def embeddings(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return [(3 * a).to(dtype), (a + noise).to(dtype)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "d"), [(2, 3), (3, 7), (33, 16), (700, 5)])
def test_nt_xent_equals_the_published_loss(n: int, d: int, dtype: torch.dtype) -> None:
    inputs = embeddings(n, d, dtype=dtype)
    for temperature in (0.5, 0.05):
        value, gradients = with_gradients(
            lambda a, b, t=temperature: 3 * nt_xent_loss(a, b, temperature=t, impl="torch"), *inputs
        )
        expected, expected_gradients = with_gradients(
            lambda a, b, t=temperature: 3 * published.nt_xent(a, b, t), *(x.double() for x in inputs)
        )
        assert abs(value - expected) <= TOLERANCE[dtype] * max(1, expected)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            assert gradient.dtype == dtype
            # A gradient that all but vanishes keeps the rounding of the terms that cancel in it.
            assert (gradient.double() - wanted).norm() <= TOLERANCE[dtype] * max(0.1, wanted.norm())


def test_nt_xent_walks_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iic_dist.ops.nt_xent.BLOCK_ELEMENTS", 100)  # three rows of 2 x 15 a block
    value, gradients = with_gradients(lambda a, b: nt_xent_loss(a, b, impl="torch"), *embeddings(15, 4))
    expected, expected_gradients = with_gradients(published.nt_xent, *embeddings(15, 4))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("n", [2, 5])
def test_nt_xent_of_collapsed_embeddings_is_ln_of_the_others(n: int) -> None:
    same = torch.ones(n, 3)
    torch.testing.assert_close(nt_xent_loss(same, same), torch.tensor(math.log(2 * n - 1)))


def test_nt_xent_is_safe_at_a_small_temperature_and_with_identical_rows() -> None:
    a, b = embeddings(20, 8, dtype=torch.float32)
    b[:10] = a[:10]
    b[10:] = -a[10:]
    value, gradients = with_gradients(lambda a, b: nt_xent_loss(a, b, temperature=0.005), a, b)
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("a", "b", "temperature", "says"),
    [
        (torch.ones(4, 3), torch.ones(5, 3), 0.5, r"\(5, 3\).*must both be"),
        (torch.ones(0, 3), torch.ones(0, 3), 0.5, "empty batch"),
        (torch.ones(1, 3), torch.ones(1, 3), 0.5, "no negatives"),
        (torch.ones(4, 3), torch.ones(4, 3), 0.0, "temperature=0.0"),
        (torch.ones(4, 3), torch.ones(4, 3).half(), 0.5, "float16"),
    ],
)
def test_nt_xent_names_what_is_wrong(a: Tensor, b: Tensor, temperature: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        nt_xent_loss(a, b, temperature=temperature)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="impl='quick'"):
        iic_loss(*logits(4, 1, 3, 1), impl="quick")


SHARDS = [[12], [6, 6], [4, 4, 4], [3, 3, 3, 3], [7, 5], [1, 9, 2], [2, 5, 1, 4]]


@pytest.mark.parametrize("shards", SHARDS, ids=str)
@pytest.mark.parametrize(("loss", "repeats"), [("iic", 1), ("iic", 3), ("iic with a prior", 2), ("nt_xent", 1)])
def test_value_and_gradient_of_any_sharding_are_those_of_one_process(
    ranks: Ranks, loss: str, repeats: int, shards: list[int], generator: torch.Generator
) -> None:
    first = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    second = first + torch.randn(repeats, 12, 7, generator=generator, dtype=torch.float64)
    model = rank_tasks.small_model(loss)
    if loss != "nt_xent":
        prior = torch.tensor(rank_tasks.PRIOR, dtype=torch.float64) if loss == "iic with a prior" else None
        logits = model(first), model(second.flatten(0, 1))
        expected = published.iic(*logits, rank_tasks.ENTROPY_WEIGHT, prior).sum()
    else:
        expected = published.nt_xent(model(first), model(second[0]), rank_tasks.TEMPERATURE)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for value, gradients in ranks.run(len(shards), rank_tasks.value_and_gradient, loss, first, second, shards):
        torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(gradients, list(wanted), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shards", [[6, 6], [2, 5, 1, 4]], ids=str)
def test_other_losses_fit_between_start_and_end_of_nt_xent(
    ranks: Ranks, shards: list[int], generator: torch.Generator
) -> None:
    first = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    second = first + torch.randn(12, 6, generator=generator, dtype=torch.float64)
    logits = [x.reshape(12, 2, 3) for x in (first, second)]
    expected = published.nt_xent(first, second, rank_tasks.TEMPERATURE), published.iic(*logits, 1.0).sum()
    for values in ranks.run(len(shards), rank_tasks.interleaved_losses, first, second, shards):
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)


def test_one_image_over_all_ranks_has_no_negatives(ranks: Ranks) -> None:
    (message,) = ranks.run(1, rank_tasks.single_pair)
    assert "at least 2 images" in message


@pytest.mark.parametrize("loss", [iic_loss, nt_xent_loss])
def test_a_single_process_loss_compiles_into_one_graph(loss: Callable[..., Tensor]) -> None:
    inputs = logits(6, 2, 5, 2) if loss is iic_loss else embeddings(6, 5)
    eager = with_gradients(lambda a, b: loss(a, b)[0].sum() if loss is iic_loss else loss(a, b), *inputs)
    compiled = torch.compile(
        lambda a, b: loss(a, b)[0].sum() if loss is iic_loss else loss(a, b),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(with_gradients(compiled, *inputs), eager)
