"""How clustering heads are trained on neighbours: settings, and the phases from many sub-heads to the best."""

from __future__ import annotations

from dataclasses import dataclass

EXPLORING_WEIGHT = 2.0
"""Least entropy weight of random heads: with less they stop where clusters are empty (4 to 13 points of accuracy)."""

FIRST_DEVIATION = 0.58
"""Of the first weights, times the root of the width: random heads that are sure at once stop early."""

POOL = 2
"""Random heads for each that is left in the end."""

STARTED = 3
"""Heads for each that is left in the end that start at clusters, and join when the random ones have explored."""


@dataclass(frozen=True)
class HeadTraining:
    """How the heads are trained.

    Attributes:
        steps: Updates.
        partners: Of each image in a step.
        walk: Steps of the random walk from an image to its partner, once the heads have started.
        batch_size: Images in a step over all ranks; of fewer images all.
        lr: Learning rate of AdamW, which falls to zero as a cosine.
        weight_decay: Of AdamW.
        seed: Of the run: decides first weights, batches and partners.
        impl: Of the loss: auto, fused or torch.
    """

    steps: int
    partners: int
    walk: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    impl: str = "auto"


@dataclass(frozen=True)
class Phase:
    """A part of the training, between two selections.

    Attributes:
        first: Step that it begins with.
        pool: Sub-heads of each head, for each that is left in the end.
        explores: Whether these are random heads on their way: direct neighbours, a strong push towards equal sizes.
    """

    first: int
    pool: int
    explores: bool = False


def plan(steps: int) -> list[Phase]:
    """Return the phases of so many steps: random heads; others that start at clusters too; the better; the best."""
    return [
        Phase(0, POOL, explores=True),
        Phase(int(0.25 * steps), POOL + STARTED),
        Phase(int(0.40 * steps), POOL),
        Phase(int(0.60 * steps), 1),
    ]
