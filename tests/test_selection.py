"""The record of a pass: its numbers are those of the published loss on the joint of the pass."""

from __future__ import annotations

import math

import published
import pytest
import torch

from iic_dist.losses import iic_loss
from iic_dist.objective import Objective
from iic_dist.selection import SubHeadRecord, used_clusters

CPU = torch.device("cpu")
KEPT, SKIPPED = torch.tensor(False), torch.tensor(True)
SIZES = torch.arange(1.0, 6, dtype=torch.float64)


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
        record.add("clustering_5", iic_loss(first[rows], second[rows]).joint, KEPT)
    record.add("clustering_5", torch.full((3, 5, 5), math.nan, dtype=torch.float64), SKIPPED)
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


def test_used_clusters_have_more_than_a_tenth_of_an_equal_share() -> None:
    shares = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.93, 0.03, 0.02, 0.02], [1.0, 0, 0, 0]])
    assert used_clusters(shares).tolist() == [4, 2, 1]
