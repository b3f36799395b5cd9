"""A NaN or Inf on one of two ranks, in ten places: no rank keeps anything of it."""

from __future__ import annotations

import itertools

import pytest
import rank_tasks
from ranks import Ranks

PLACES = ["views", "features", "clustering", "contrastive", "gradient"]
OPTIONS = ["--data.batch_size", "64", "--model.sub_heads", "2", "--monitor.progress", "false"]


@pytest.mark.parametrize(("place", "value"), list(itertools.product(PLACES, ["nan", "inf"])))
def test_a_step_that_is_bad_on_one_rank_is_skipped_on_all(pair: Ranks, place: str, value: str) -> None:
    for rank in pair.run(2, rank_tasks.bad_step, OPTIONS, place, float(value)):
        assert rank == {"skipped": 1, "unchanged": True, "finite": True, "moved_afterwards": True}
