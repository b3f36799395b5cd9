"""The self-labelling loss against its definition written as loops in float64, on one rank and on several."""

from __future__ import annotations

import math

import pytest
import rank_tasks
import torch
from loss_cases import with_gradients
from ranks import Ranks
from torch import Tensor

from iic_dist.losses.self_label import self_label_loss

CONFIDENCE = 0.6


def pairs(n: int, h: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = 2 * torch.randn(n, h, k, generator=generator, dtype=torch.float64)
    return first, first + torch.randn(n, h, k, generator=generator, dtype=torch.float64)


def by_hand(logits: Tensor, strong: Tensor, confidence: float) -> Tensor:
    """For each sub-head: of each cluster with sure images the mean of their -ln q, and the mean of those; (H,)."""
    losses = []
    for h in range(logits.shape[1]):
        of_cluster: dict[int, list[Tensor]] = {}
        for image in range(len(logits)):
            numbers = [math.exp(value) for value in logits[image, h].tolist()]
            shares = [number / sum(numbers) for number in numbers]
            cluster = shares.index(max(shares))
            if shares[cluster] > confidence:
                theirs = strong[image, h].exp()
                of_cluster.setdefault(cluster, []).append(-(theirs[cluster] / theirs.sum()).log())
        means = [torch.stack(each).mean() for each in of_cluster.values()]
        losses.append(torch.stack(means).mean() if means else 0 * strong.sum())
    return torch.stack(losses)


@pytest.mark.parametrize(("n", "h", "k"), [(1, 1, 2), (20, 3, 4), (64, 2, 10)])
@pytest.mark.parametrize("confidence", [0.3, CONFIDENCE, 0.95])
def test_value_and_gradient_are_those_of_the_definition(n: int, h: int, k: int, confidence: float) -> None:
    logits, strong = pairs(n, h, k)
    upstream = torch.linspace(0.5, 2, h, dtype=torch.float64)
    value, [gradient] = with_gradients(
        lambda s: (self_label_loss(logits, s, confidence=confidence) * upstream).sum(), strong
    )
    expected, [wanted] = with_gradients(lambda s: (by_hand(logits, s, confidence) * upstream).sum(), strong)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-13)


def test_where_no_image_is_sure_there_is_nothing_to_learn() -> None:
    logits, strong = torch.zeros(6, 2, 3, dtype=torch.float64), pairs(6, 2, 3)[1]
    value, [gradient] = with_gradients(lambda s: self_label_loss(logits, s, confidence=0.5).sum(), strong)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(strong))


def test_exactly_as_sure_as_asked_is_not_surer() -> None:
    logits = torch.zeros(4, 1, 2, dtype=torch.float64)
    assert self_label_loss(logits, logits, confidence=0.5) == 0
    assert self_label_loss(logits, logits, confidence=0.49) == pytest.approx(math.log(2))


def test_clusters_count_the_same_however_many_images_are_sure_of_them() -> None:
    """Nine images of one cluster, one of another: the mean of the two clusters, not of the ten images."""
    logits = torch.full((10, 1, 3), -50.0, dtype=torch.float64)
    logits[:9, 0, 0] = logits[9, 0, 2] = 50
    strong = torch.zeros(10, 1, 3, dtype=torch.float64)
    strong[9, 0, 2] = 7
    expected = (math.log(3) + math.log(1 + 2 * math.exp(-7))) / 2
    assert self_label_loss(logits, strong, confidence=0.9).item() == pytest.approx(expected, rel=1e-14)
    one = self_label_loss(logits[:9], strong[:9], confidence=0.9)  # clusters that nobody is sure of count nothing
    assert one.item() == pytest.approx(math.log(3), rel=1e-14)


def test_the_image_itself_is_not_taught() -> None:
    logits, strong = (each.requires_grad_() for each in pairs(8, 2, 3))
    self_label_loss(logits, strong, confidence=0.4).sum().backward()
    assert logits.grad is None


def test_half_precision_is_not_rounded() -> None:
    logits, strong = (each.bfloat16() for each in pairs(30, 2, 5))
    value = self_label_loss(logits, strong, confidence=CONFIDENCE)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, self_label_loss(logits.float(), strong.float(), confidence=CONFIDENCE))


@pytest.mark.parametrize("shards", [[12], [6, 6], [7, 5], [1, 9, 2], [4, 4, 4]], ids=str)
@pytest.mark.parametrize("confidence", [0.35, 0.999])
def test_value_and_gradient_of_any_sharding_are_those_of_one_process(
    ranks: Ranks, shards: list[int], confidence: float, generator: torch.Generator
) -> None:
    """With 0.999 no image is sure."""
    first = 2 * torch.randn(12, 7, generator=generator, dtype=torch.float64)
    second = first + torch.randn(1, 12, 7, generator=generator, dtype=torch.float64)
    model = rank_tasks.small_model("self-labels")
    expected = by_hand(model(first), model(second[0]), confidence).sum()
    assert (float(expected.detach()) > 0) == (confidence < 0.9)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    name = f"self-labels above {confidence}"
    for value, gradients in ranks.run(len(shards), rank_tasks.value_and_gradient, name, first, second, shards):
        torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(gradients, list(wanted), rtol=0, atol=1e-10)
