"""The stages of a run, and the course of those that go over the images in epochs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from iic_dist.config import Config
from iic_dist.config.settings import OptimConfig
from iic_dist.distributed import Place
from iic_dist.training.head_plan import EXPLORING_WEIGHT
from iic_dist.training.optim import learning_rate
from iic_dist.training.schedule import Pass, Schedule, build_schedule

STAGES = ("representation", "neighbours", "refine")
"""All stages, in order; each may be absent."""


def stages_of(config: Config) -> list[str]:
    """Name the stages that a run has, in order."""
    lengths = (config.train.epochs, config.neighbours.steps, config.refine.epochs)
    return [stage for stage, length in zip(STAGES, lengths, strict=True) if length]


@dataclass(frozen=True)
class Course:
    """A stage that trains the network in epochs: what counts for it, and where it lies in the run.

    Attributes:
        stage: Its name.
        config: The settings of the run, with those of the stage in the place of the first one's.
        schedule: Which heads train when.
        first_epoch: Epochs of the run before it.
        first_step: Steps of the run before it.
    """

    stage: str
    config: Config
    schedule: Schedule
    first_epoch: int = 0
    first_step: int = 0

    @property
    def last_epoch(self) -> int:
        """Epochs of the run at its end."""
        return self.first_epoch + self.config.train.epochs

    @property
    def total_steps(self) -> int:
        """Its own steps."""
        return self.schedule.total_steps(self.config.train.epochs)

    @property
    def confidence(self) -> float | None:
        """How sure an image must be of its cluster to teach it; None where clusters are not taught so."""
        asked = self.config.refine
        return asked.confidence if self.stage == "refine" and asked.towards == "labels" else None

    def steps_left(self, epoch: int, step: int) -> list[tuple[Pass, int]]:
        """List the steps of an epoch of the run that come after `step` steps of the run."""
        done = step - self.first_step - self.schedule.total_steps(epoch - self.first_epoch)
        return self.schedule.steps(epoch - self.first_epoch)[done:]

    def learning_rate(self, heads: Sequence[str], step: int) -> float:
        """Return the learning rate of a step of the run that trains `heads`."""
        optim = self.config.optim
        alone = tuple(heads) == ("contrastive",) and optim.contrastive_lr is not None
        return learning_rate(
            step - self.first_step,
            total_steps=self.total_steps,
            base=optim.contrastive_lr if alone and optim.contrastive_lr is not None else optim.lr,
            schedule=optim.schedule,
            warmup_steps=round(optim.warmup_epochs * self.total_steps / self.config.train.epochs),
        )


def representation(config: Config, place: Place, num_labelled: int, num_images: int) -> Course:
    """Lay out the first stage of a complete config.

    Args:
        config: What is asked for.
        place: This rank.
        num_labelled: Images that all heads train on.
        num_images: These and the unlabelled ones.

    Raises:
        UsageError: the batch size does not fit the images or the ranks.
    """
    return Course("representation", config, build_schedule(config, place, num_labelled, num_images))


def refine(config: Config, place: Place, num_images: int, first_step: int) -> Course:
    """Lay out the last stage: the selected sub-heads of the clustering heads, and the contrastive head if it counts.

    Args:
        config: Complete.
        place: This rank.
        num_images: The images that the clustering heads train on.
        first_step: Steps of the run before it.
    """
    own = copy.deepcopy(config)
    own.train.epochs, own.train.schedule = config.refine.epochs, "joint"
    own.train.contrastive_warmup_epochs = own.train.restart_after = 0
    own.model.num_overclusters, own.model.sub_heads = 0, 1
    if not config.refine.contrastive:
        own.model.projection_dim = 0
    own.loss.contrastive, own.loss.clustering = config.refine.contrastive, 1.0
    # Refinement was measured with this push alone.
    own.loss.entropy_weight = max(config.neighbours.entropy_weight, EXPLORING_WEIGHT)
    own.optim = OptimConfig(name="adamw", lr=config.refine.lr, schedule="cosine", weight_decay=1e-4)
    own.optim.warmup_epochs = min(1.0, config.refine.epochs / 4)
    own.views.repeats = 1
    schedule = build_schedule(own, place, num_images, num_images)
    return Course("refine", own, schedule, config.train.epochs, first_step)
