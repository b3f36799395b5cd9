from __future__ import annotations

from pathlib import Path

import pytest
import rank_tasks
from ranks import Ranks

from iic_dist.distributed import Place


@pytest.mark.parametrize("sizes", [[3], [2, 2], [4, 1], [1, 3, 2], [2, 2, 2, 2]], ids=str)
def test_rows_of_all_ranks_stand_in_rank_order(ranks: Ranks, sizes: list[int]) -> None:
    expected = [[rank, i] for rank, size in enumerate(sizes) for i in range(size)]
    for known, rows in ranks.run(len(sizes), rank_tasks.gather, sizes):
        assert known == sizes
        assert rows.tolist() == expected


def test_equal_shards_land_in_place_and_unequal_ones_are_copied_once(ranks: Ranks) -> None:
    row = 8 * 4
    assert ranks.run(3, rank_tasks.bytes_copied_by_gather, [5, 5, 5]) == [0, 0, 0]
    whole = (4 + 1 + 5) * row
    padded = [5 * row, 5 * row, 0]  # a rank's own shard, to the length of the longest
    assert ranks.run(3, rank_tasks.bytes_copied_by_gather, [4, 1, 5]) == [whole + own for own in padded]


def test_the_place_is_read_from_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place.from_environment() == Place(0, 1, 0, 1)
    for name, value in (("RANK", 5), ("WORLD_SIZE", 8), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    assert Place.from_environment() == Place(5, 8, 1, 4)
    assert not Place.from_environment().is_main


def test_the_others_wait_for_the_main_process_of_their_machine(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(4, rank_tasks.after_the_local_main, str(tmp_path)) == [True] * 4
