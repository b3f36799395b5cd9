"""Which heads train when, and on which images: a pure function of the epoch and the place in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iic_dist.config import Config
from iic_dist.data.sampler import Batch, Sampler
from iic_dist.distributed import Place


def kind_of_head(head: str) -> str:
    """Return what sort of head a name stands for: clustering_20 is one of several clustering heads."""
    return head.partition("_")[0]


@dataclass(frozen=True)
class Pass:
    """One walk over the images with some heads in training.

    Attributes:
        heads: Which.
        steps: How many steps it takes.
        first_view: Number of its first view, so that the passes of an epoch see different views.
    """

    heads: tuple[str, ...]
    steps: int
    first_view: int


class Schedule:
    """The passes of every epoch.

    Args:
        heads: The heads of the model; several of one kind always train together.
        sampler: Order of the images that all heads train on.
        wide_sampler: Order of these and the unlabelled images, for all heads but the clustering ones; `sampler` itself
            where there are none.
        alternate: Give each head its own pass in every epoch, instead of one pass for all.
        order: Kinds of heads of an alternating epoch, first to last.
        contrastive_warmup_epochs: First epochs, in which the contrastive head trains alone.
        views: Views of an image in a step, 1 + R.
    """

    def __init__(
        self,
        heads: Sequence[str],
        sampler: Sampler,
        wide_sampler: Sampler,
        *,
        alternate: bool,
        order: Sequence[str],
        contrastive_warmup_epochs: int,
        views: int,
    ) -> None:
        self.heads = tuple(heads)
        self.samplers = {head: sampler if kind_of_head(head) == "clustering" else wide_sampler for head in heads}
        self.alternate = alternate
        turns = [tuple(head for head in heads if kind_of_head(head) == turn) for turn in order]
        self.order = [turn for turn in turns if turn]
        self.warmup_epochs = contrastive_warmup_epochs
        self.views = views

    @property
    def heads_take_turns(self) -> bool:
        """True where some step leaves a head out."""
        return self.alternate or self.warmup_epochs > 0

    def passes(self, epoch: int) -> list[Pass]:
        """List the passes of an epoch, in order."""
        turns = [self.heads]
        if epoch < self.warmup_epochs:
            turns = [("contrastive",)]
        elif self.alternate:
            turns = self.order
        return [
            Pass(turn, self.samplers[turn[0]].steps_per_epoch, number * self.views) for number, turn in enumerate(turns)
        ]

    def steps(self, epoch: int) -> list[tuple[Pass, int]]:
        """List the steps of an epoch in order: each pass and the place in it, from 0."""
        return [(each, position) for each in self.passes(epoch) for position in range(each.steps)]

    def total_steps(self, epochs: int) -> int:
        """Count the steps of the first `epochs` epochs: all of the warm-up are alike, and all behind it."""
        warmup = min(epochs, self.warmup_epochs)
        counts = ((warmup, self.passes(0)), (epochs - warmup, self.passes(self.warmup_epochs)))
        return sum(count * each.steps for count, passes in counts for each in passes)

    def batches(self, epoch: int, heads: Sequence[str], position: int) -> list[tuple[tuple[str, ...], Batch]]:
        """Choose this rank's images of one step of a pass: one batch for heads that share their images, else two."""
        groups: dict[Sampler, list[str]] = {}
        for head in heads:
            groups.setdefault(self.samplers[head], []).append(head)
        pace = self.samplers[heads[0]].steps_per_epoch
        return [
            (tuple(members), sampler.batch(self._steps_before(epoch, sampler, pace) + position))
            for sampler, members in groups.items()
        ]

    def _steps_before(self, epoch: int, sampler: Sampler, pace: int) -> int:
        """Count the steps that `sampler` has behind it when a pass of `pace` steps begins.

        A joint step on two sets walks over the wide one at the pace of the narrow one.
        """
        warmup = min(epoch, self.warmup_epochs)
        return warmup * sampler.steps_per_epoch + (epoch - warmup) * pace


def build_schedule(config: Config, place: Place, num_labelled: int, num_images: int) -> Schedule:
    """Lay out the passes of every epoch.

    Args:
        config: What is asked for.
        place: This rank, which gets its share of each batch.
        num_labelled: Images that all heads train on, the first ones.
        num_images: These and the unlabelled ones.

    Raises:
        UsageError: the batch size does not fit the images or the ranks.
    """
    samplers = [
        Sampler(size, config.data.batch_size, config.run.seed, place.rank, place.world_size)
        for size in dict.fromkeys((num_labelled, num_images))
    ]
    return Schedule(
        config.heads,
        samplers[0],
        samplers[-1],
        alternate=config.train.schedule == "alternate",
        order=config.train.order,
        contrastive_warmup_epochs=config.train.contrastive_warmup_epochs,
        views=1 + config.views.repeats,
    )
