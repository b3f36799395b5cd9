from __future__ import annotations

import math

import published
import pytest
import torch

from iic_dist.evaluation.sub_heads import SubHeadRecord, used_clusters
from iic_dist.losses import iic_loss
from iic_dist.losses.objective import Objective

NO, YES = torch.tensor(False), torch.tensor(True)
CPU = torch.device("cpu")
SIZES = torch.arange(1.0, 6, dtype=torch.float64)


def record(h: int = 2, k: int = 4) -> SubHeadRecord:
    return SubHeadRecord({"clustering": (h, k)}, {"clustering": Objective(1.0)}, CPU, torch.float64)


def agreeing(*shares: float) -> torch.Tensor:
    """The joint of views that always agree, with these shares of the images in each cluster."""
    return torch.diag(torch.tensor(shares, dtype=torch.float64))


def test_the_loss_is_that_of_the_mean_joint_of_the_pass() -> None:
    heads = record(1)
    heads.begin_pass(["clustering"])
    for place in range(4):
        one_hot = [float(place == k) for k in range(4)]
        heads.add("clustering", agreeing(*one_hot)[None], NO)
    heads.end_pass(["clustering", "contrastive"])
    assert float(heads.losses["clustering"]) == pytest.approx(-math.log(4))
    assert heads.lowest_loss() == pytest.approx(-math.log(4))
    assert heads.collapsed == {"clustering": []}


def test_a_skipped_step_does_not_count() -> None:
    heads = record(1)
    heads.begin_pass(["clustering"])
    heads.add("clustering", agreeing(0.25, 0.25, 0.25, 0.25)[None], NO)
    heads.add("clustering", torch.full((1, 4, 4), math.nan, dtype=torch.float64), YES)
    heads.end_pass(["clustering"])
    assert float(heads.losses["clustering"]) == pytest.approx(-math.log(4))


def test_a_pass_of_skipped_steps_alone_leaves_the_loss_as_it_was() -> None:
    heads = record(1)
    heads.begin_pass(["clustering"])
    heads.add("clustering", torch.full((1, 4, 4), math.nan, dtype=torch.float64), YES)
    assert heads.end_pass(["clustering"]) == []
    assert heads.lowest_loss() == math.inf


def test_a_collapsed_sub_head_is_named_once() -> None:
    heads = record()
    good, one = agreeing(0.25, 0.25, 0.25, 0.25), agreeing(0.99, 0.01, 0.0, 0.0)

    def end_of_pass(*joints: torch.Tensor) -> list[str]:
        heads.begin_pass(["clustering"])
        heads.add("clustering", torch.stack(joints), NO)
        return heads.end_pass(["clustering"])

    assert end_of_pass(good, good) == []
    [warning] = end_of_pass(good, one)
    assert "clustering head has collapsed in 1 of its 2 sub-heads ([1])" in warning
    assert "uses 1 of 4 clusters" in warning
    assert end_of_pass(good, one) == []
    assert heads.collapsed == {"clustering": [1]}
    assert end_of_pass(good, good) == []
    assert heads.collapsed == {"clustering": []}


@pytest.mark.parametrize(
    ("shares", "collapsed"),
    [
        ((0.5, 0.5, 0.0, 0.0), False),  # half of the clusters, and half of ln K
        ((0.96, 0.04, 0.0, 0.0), False),  # 0.04 is above 0.1 / 4, and the entropy is 0.121 ln K
        ((0.972, 0.028, 0.0, 0.0), True),  # both used, but an entropy of 0.092 ln K
        ((0.7, 0.1, 0.1, 0.1), False),
        ((1.0, 0.0, 0.0, 0.0), True),
    ],
)
def test_where_a_collapse_begins(shares: tuple[float, ...], collapsed: bool) -> None:
    heads = record(1)
    heads.begin_pass(["clustering"])
    heads.add("clustering", agreeing(*shares)[None], NO)
    assert bool(heads.end_pass(["clustering"])) is collapsed


def test_used_clusters_have_more_than_a_tenth_of_an_equal_share() -> None:
    shares = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.45, 0.03, 0.02], [1.0, 0, 0, 0]])
    assert used_clusters(shares).tolist() == [4, 3, 1]


def test_the_middle_of_a_pass_comes_back() -> None:
    heads, other = record(1), record(1)
    heads.begin_pass(["clustering"])
    heads.add("clustering", agreeing(1.0, 0.0, 0.0, 0.0)[None], NO)
    other.load_state_dict(heads.state_dict())
    for each in (heads, other):
        each.add("clustering", agreeing(0.0, 1.0, 0.0, 0.0)[None], NO)
        each.end_pass(["clustering"])
    assert torch.equal(heads.losses["clustering"], other.losses["clustering"])
    assert float(other.losses["clustering"]) == pytest.approx(-math.log(2))


@pytest.mark.parametrize("objective", [Objective(1.0), Objective(2.0), Objective(1.5, SIZES)], ids=str)
def test_a_pass_is_judged_as_one_large_batch(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(0)
    first = 2 * torch.randn(60, 3, 5, generator=generator, dtype=torch.float64)
    second = first + torch.randn(60, 3, 5, generator=generator, dtype=torch.float64)
    names = ("clustering_5", "other")
    record = SubHeadRecord(dict.fromkeys(names, (3, 5)), dict.fromkeys(names, objective), CPU, torch.float64)
    record.begin_pass(["clustering_5", "contrastive"])
    for part in range(3):
        rows = slice(20 * part, 20 * part + 20)
        record.add("clustering_5", iic_loss(first[rows], second[rows]).joint, NO)
    record.add("clustering_5", torch.full((3, 5, 5), math.nan, dtype=torch.float64), YES)
    record.end_pass(["clustering_5", "contrastive"])
    expected = published.iic(first, second, objective.entropy_weight, objective.prior)
    torch.testing.assert_close(record.losses["clustering_5"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(record.information["clustering_5"], -published.iic(first, second), rtol=0, atol=1e-12)
    marginal = torch.cat([first, second]).softmax(2).mean(0)
    torch.testing.assert_close(record.entropy["clustering_5"], torch.special.entr(marginal).sum(1), rtol=0, atol=1e-12)
    assert record.selected("clustering_5") == int(expected.argmin())
    assert record.losses["other"].isinf().all()

    again = SubHeadRecord({"clustering_5": (3, 5)}, {"clustering_5": objective}, CPU, torch.float64)
    again.load_state_dict(record.state_dict())
    for name in ("losses", "information", "entropy"):
        assert torch.equal(getattr(again, name)["clustering_5"], getattr(record, name)["clustering_5"])
