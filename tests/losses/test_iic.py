"""The IIC loss against its published form in float64, on one rank and on several."""

from __future__ import annotations

import math

import published
import pytest
import rank_tasks
import torch
from loss_cases import IMPLEMENTATIONS, SHARDS, TOLERANCE, logits, relative_error, with_gradients
from ranks import Ranks
from torch import Tensor

from iic_dist.losses import iic_loss


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


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="impl='quick'"):
        iic_loss(*logits(4, 1, 3, 1), impl="quick")


@pytest.mark.parametrize("shards", SHARDS, ids=str)
@pytest.mark.parametrize(("loss", "repeats"), [("iic", 1), ("iic", 3), ("iic with a prior", 2)])
def test_value_and_gradient_of_any_sharding_are_those_of_one_process(
    ranks: Ranks, loss: str, repeats: int, shards: list[int], generator: torch.Generator
) -> None:
    first = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    second = first + torch.randn(repeats, 12, 7, generator=generator, dtype=torch.float64)
    model = rank_tasks.small_model(loss)
    prior = torch.tensor(rank_tasks.PRIOR, dtype=torch.float64) if loss == "iic with a prior" else None
    outputs = model(first), model(second.flatten(0, 1))
    expected = published.iic(*outputs, rank_tasks.ENTROPY_WEIGHT, prior).sum()
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for value, gradients in ranks.run(len(shards), rank_tasks.value_and_gradient, loss, first, second, shards):
        torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(gradients, list(wanted), rtol=0, atol=1e-10)


def test_on_one_process_it_compiles_into_one_graph() -> None:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        return iic_loss(a, b).loss.sum()

    inputs = logits(6, 2, 5, 2)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, *inputs), with_gradients(loss, *inputs))
