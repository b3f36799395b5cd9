"""The order of the images: a function of seed and step, the same on any number of ranks."""

from __future__ import annotations

import pytest
import torch

from iic_dist.data.sampler import Sampler
from iic_dist.errors import UsageError
from iic_dist.ops.philox import permutation


def test_steps_cut_the_epochs_permutations():
    sampler = Sampler(num_images=23, batch_size=5, seed=7)
    assert sampler.steps_per_epoch == 4  # 3 images of each permutation are left out
    for step in range(12):
        batch = sampler.batch(step)
        epoch, position = step // 4, step % 4
        assert batch.epoch == epoch
        assert batch.indices.tolist() == permutation(7, epoch, 23)[5 * position : 5 * position + 5].tolist()


def test_an_epoch_repeats_no_image_and_epochs_differ():
    sampler = Sampler(num_images=100, batch_size=10, seed=0)
    epochs = [torch.cat([sampler.batch(10 * epoch + b).indices for b in range(10)]) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(100))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    assert not torch.equal(epochs[0], Sampler(100, 100, seed=1).batch(0).indices)


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
def test_ranks_in_order_make_the_batch_of_one_process(world_size):
    whole = Sampler(num_images=50, batch_size=12, seed=3)
    ranks = [Sampler(50, 12, 3, rank, world_size) for rank in range(world_size)]
    for step in range(9):
        parts = [sampler.batch(step) for sampler in ranks]
        assert {len(part.indices) for part in parts} == {12 // world_size}
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.batch(step).indices)
        assert {part.epoch for part in parts} == {whole.batch(step).epoch}


def test_a_step_does_not_depend_on_the_steps_before_it():
    in_order, at_random = Sampler(40, 8, seed=5), Sampler(40, 8, seed=5)
    expected = [in_order.batch(step).indices.tolist() for step in range(20)]
    for step in (19, 0, 7, 7, 18, 3, 12, 1):
        assert at_random.batch(step).indices.tolist() == expected[step]


def test_indices_are_int64_on_the_cpu():
    indices = Sampler(9, 3, seed=0, rank=1, world_size=3).batch(4).indices
    assert indices.dtype == torch.int64
    assert indices.device.type == "cpu"
    assert indices.shape == (1,)


def test_one_batch_may_be_the_whole_set():
    sampler = Sampler(num_images=6, batch_size=6, seed=0)
    assert sampler.steps_per_epoch == 1
    assert sorted(sampler.batch(5).indices.tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("num_images", "batch_size", "world_size", "message"),
    [
        (100, 0, 1, "at least 1, got 0"),
        (100, -4, 1, "at least 1, got -4"),
        (100, 101, 1, "101 is larger than the data set (100 images): use 100 or less"),
        (100, 10, 4, "10 does not divide by 4 ranks: use 8 or 12"),
        (100, 3, 4, "3 does not divide by 4 ranks: use 4 or 8"),
        (10, 10, 4, "10 does not divide by 4 ranks: use 4 or 8"),
        (6, 5, 4, "5 does not divide by 4 ranks: use 4"),
        (3, 3, 4, "3 does not divide by 4 ranks: use at most 3 ranks"),
    ],
)
def test_a_bad_batch_size_is_one_line_with_the_way_out(num_images, batch_size, world_size, message):
    with pytest.raises(UsageError) as caught:
        Sampler(num_images, batch_size, seed=0, rank=world_size - 1, world_size=world_size)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    for word in str(caught.value).partition(" ranks: use ")[2].split():
        if word.isdigit() and "at most" not in str(caught.value):
            Sampler(num_images, int(word), seed=0, world_size=world_size)  # what it suggests works
