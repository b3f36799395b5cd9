from __future__ import annotations

import math

import pytest
import torch

from iic_dist.selection import SubHeadRecord, used_clusters

NO, YES = torch.tensor(False), torch.tensor(True)
CPU = torch.device("cpu")


def record(h: int = 2, k: int = 4) -> SubHeadRecord:
    return SubHeadRecord({"clustering": (h, k)}, 1.0, CPU, torch.float64)


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


def test_used_clusters_are_counted_by_the_rows_of_the_joint() -> None:
    assert used_clusters(agreeing(0.5, 0.45, 0.03, 0.02)).item() == 3


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
