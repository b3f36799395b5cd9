"""The contrastive loss against its published form in float64, on one rank and on several."""

from __future__ import annotations

import math

import published
import pytest
import rank_tasks
import torch
from loss_cases import SHARDS, TOLERANCE, embeddings, with_gradients
from ranks import Ranks
from torch import Tensor

from iic_dist.losses import nt_xent_loss


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
        (torch.ones(4, 3), torch.ones(4, 3), 0.0, "temperature=0.0"),
        (torch.ones(4, 3), torch.ones(4, 3).half(), 0.5, "float16"),
    ],
)
def test_nt_xent_names_what_is_wrong(a: Tensor, b: Tensor, temperature: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        nt_xent_loss(a, b, temperature=temperature)


@pytest.mark.parametrize("shards", SHARDS, ids=str)
def test_value_and_gradient_of_any_sharding_are_those_of_one_process(
    ranks: Ranks, shards: list[int], generator: torch.Generator
) -> None:
    first = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    second = first + torch.randn(1, 12, 7, generator=generator, dtype=torch.float64)
    model = rank_tasks.small_model("nt_xent")
    expected = published.nt_xent(model(first), model(second[0]), rank_tasks.TEMPERATURE)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for value, gradients in ranks.run(len(shards), rank_tasks.value_and_gradient, "nt_xent", first, second, shards):
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


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_image_is_told_apart_from_nothing(dtype: torch.dtype, impl: str) -> None:
    """A batch of one image ended in a traceback; its loss is ln 1 = 0, and no change of the embeddings matters."""
    inputs = [torch.tensor([values], dtype=dtype) for values in ([3.0, -4.0, 1e-3], [0.0, 6e4, 2.0])]
    value, gradients = with_gradients(lambda a, b: nt_xent_loss(a, b, impl=impl), *inputs)
    assert value == 0
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(torch.equal(gradient, torch.zeros_like(x)) for gradient, x in zip(gradients, inputs, strict=True))
    assert nt_xent_loss(inputs[0] * float("nan"), inputs[1], impl=impl).isnan()


def test_one_image_over_all_ranks_is_no_error(ranks: Ranks) -> None:
    assert ranks.run(1, rank_tasks.single_pair) == [0.0]


def test_on_one_process_it_compiles_into_one_graph() -> None:
    inputs = embeddings(6, 5)
    compiled = torch.compile(lambda a, b: nt_xent_loss(a, b), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, *inputs), with_gradients(nt_xent_loss, *inputs))
