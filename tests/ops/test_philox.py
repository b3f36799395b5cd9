"""Philox against its published test vectors and a plain implementation on Python's unbounded integers."""

from __future__ import annotations

import itertools

import pytest
import torch
from draws import philox as philox_by_hand
from scipy import stats

from iic_dist.ops.philox import permutation, philox_4x32, uniforms

# Random123, kat_vectors, philox4x32 10
KNOWN = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_published_vectors(counter: list[int], key: tuple[int, int], words: list[int]) -> None:
    assert philox_4x32(torch.tensor(counter), key).tolist() == words
    assert philox_by_hand(counter, key) == words


def test_any_counter_and_key_match_python_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (5, 40, 4), generator=generator)
    for key in ((1, 2), (0xFFFFFFFF, 0x80000000)):
        words = philox_4x32(counters, key)
        assert words.shape == counters.shape
        expected = [philox_by_hand(counter, key) for counter in counters.reshape(-1, 4).tolist()]
        assert words.reshape(-1, 4).tolist() == expected


@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 7, -1])
def test_uniforms_follow_their_definition(seed: int) -> None:
    indices = torch.tensor([0, 7, 2**31 + 5, 2**32 - 1])
    drawn = uniforms(seed, 3, indices, 2, 10)
    assert drawn.dtype == torch.float32
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for row, index in zip(drawn.tolist(), indices.tolist(), strict=True):
        words = itertools.chain(*(philox_by_hand([index, 3, 2, block], key) for block in range(3)))
        assert row == [(word >> 8) * 2.0**-24 for word in words][:10]


def test_views_in_one_call_equal_views_one_by_one() -> None:
    indices, views = torch.arange(50), torch.tensor([4, 0, 9])
    together = uniforms(1, 2, indices, views.unsqueeze(1), 7)
    assert together.shape == (3, 50, 7)
    for row, view in zip(together, views.tolist(), strict=True):
        assert torch.equal(row, uniforms(1, 2, indices, view, 7))


def test_batch_and_count_change_nothing() -> None:
    indices = torch.arange(1000)
    drawn = uniforms(1, 2, indices, 0, 21)
    order = permutation(5, 0, 1000)
    assert torch.equal(uniforms(1, 2, indices[order], 0, 21), drawn[order])
    assert torch.equal(uniforms(1, 2, indices[300:301], 0, 21), drawn[300:301])
    assert torch.equal(uniforms(1, 2, indices, 0, 5), drawn[:, :5])


def test_uniform() -> None:
    drawn = uniforms(3, 0, torch.arange(20_000), 0, 8).double()
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert torch.equal(drawn * 2**24, (drawn * 2**24).round())
    for column in drawn.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3


def test_index_view_epoch_seed_and_position_are_independent() -> None:
    indices = torch.arange(20_000)
    base = uniforms(3, 0, indices, 0, 8)
    others = {
        "index": uniforms(3, 0, indices + 1, 0, 8),
        "view": uniforms(3, 0, indices, 1, 8),
        "epoch": uniforms(3, 1, indices, 0, 8),
        "seed": uniforms(4, 0, indices, 0, 8),
        "high half of the seed": uniforms(3 + 2**32, 0, indices, 0, 8),
        "position": base.roll(1, dims=1),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 4 / (8 * 20_000) ** 0.5, name  # four standard deviations
        assert (base == other).float().mean() < 1e-4, name


def test_permutation() -> None:
    orders = [permutation(seed, epoch, 5000) for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**32, 0))]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(5000))
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 10  # independent orders agree at one place on average
    assert torch.equal(orders[0], permutation(0, 0, 5000))


def test_permutation_is_pinned() -> None:
    """Another order is another training run: a checkpoint of today must resume in the same one."""
    pinned = [3, 8, 9, 6, 2, 0, 4, 5, 1, 7]
    assert permutation(0, 0, 10).tolist() == pinned
    keys = [philox_by_hand([index, 0, 0xFFFFFFFF, 0], (0, 0)) for index in range(10)]
    assert sorted(range(10), key=lambda index: keys[index][:2]) == pinned


def test_every_place_is_equally_likely() -> None:
    places = torch.stack([permutation(7, epoch, 8) for epoch in range(2000)])
    counts = torch.stack([(places == value).sum(0) for value in range(8)])
    assert stats.chisquare(counts.flatten().numpy()).pvalue > 1e-3


def test_small_permutations() -> None:
    assert permutation(0, 0, 0).tolist() == []
    assert permutation(0, 0, 1).tolist() == [0]
