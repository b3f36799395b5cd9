"""Which images make up a step: a pure function of the seed, the step, the rank and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from iic_dist.errors import UsageError
from iic_dist.ops.philox import permutation
from iic_dist.wording import counted


@dataclass(frozen=True)
class Batch:
    """One rank's images of one step.

    Attributes:
        epoch: The pass over the data, from 0.
        indices: (N,) int64 on the CPU, places in the image set.
    """

    epoch: int
    indices: Tensor


class Sampler:
    """Order of the images, without state: step s takes slice s % steps_per_epoch of its epoch's permutation.

    Rank r gets the r-th of W equal parts of that slice, so the parts in rank order are the batch of one
    process. The last num_images % batch_size images of a permutation are left out of that epoch.

    Args:
        num_images: Size of the image set.
        batch_size: G, images of a step over all ranks.
        seed: Of the run; the permutation of epoch e is drawn from (seed, e).
        rank: This process, in [0, world_size).
        world_size: W, number of processes.

    Raises:
        UsageError: batch_size is below 1, above num_images, or does not divide by world_size.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, got {batch_size}")
        if batch_size > num_images:
            raise UsageError(
                f"the batch size {batch_size} is larger than the data set ({counted(num_images, 'image')}): "
                f"use {num_images} or less"
            )
        if batch_size % world_size:
            raise UsageError(
                f"the batch size {batch_size} does not divide by {counted(world_size, 'rank')}: "
                + _nearest_batch_sizes(batch_size, world_size, num_images)
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = num_images // batch_size
        self._order: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> Batch:
        """Choose the images of global step `step` (from 0) for this rank.

        Returns:
            The epoch and G / W indices.
        """
        assert step >= 0, f"step {step}"
        epoch, position = divmod(step, self.steps_per_epoch)
        local = self.batch_size // self.world_size
        start = position * self.batch_size + self.rank * local
        return Batch(epoch, self._epoch_order(epoch)[start : start + local])

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self.seed, epoch, self.num_images))
        return self._order[1]


def _nearest_batch_sizes(batch_size: int, world_size: int, num_images: int) -> str:
    if world_size > num_images:
        return f"use at most {num_images} ranks, one for each image"
    multiples = range(world_size, num_images + 1, world_size)
    below = batch_size // world_size - 1  # place of the next smaller multiple; -1: there is none
    first = max(0, min(below, len(multiples) - 2))
    return "use " + " or ".join(str(size) for size in multiples[first : first + 2])
