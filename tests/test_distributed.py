from __future__ import annotations

import pytest
import rank_tasks
import torch
from ranks import Ranks

from iic_dist import distributed
from iic_dist.distributed import Place
from iic_dist.errors import UsageError


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


def test_devices_are_chosen_or_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device("auto", Place()) == torch.device("cpu")
    with pytest.raises(UsageError, match="'cuda'.*no CUDA device"):
        distributed.choose_device("cuda", Place())
    with pytest.raises(UsageError, match="'tpu'"):
        distributed.choose_device("tpu", Place())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.choose_device("auto", Place(3, 4, 1, 2)) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="4 ranks on a machine with 2 GPU.*nproc_per_node=2"):
        distributed.choose_device("auto", Place(0, 4, 0, 4))
    assert distributed.choose_device("cpu", Place(0, 4, 0, 4)) == torch.device("cpu")
