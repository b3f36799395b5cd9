"""The stage in which a run gets new clustering heads from neighbours in its features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from iic_dist.config import Config
from iic_dist.config.build import build_objectives
from iic_dist.data.features import noun_of
from iic_dist.errors import UsageError
from iic_dist.evaluation.sub_heads import SubHeadRecord
from iic_dist.losses import IICTerms
from iic_dist.models.feature_heads import FeatureSubHeads
from iic_dist.training.feature_space import find_neighbours, fit_space, map_features
from iic_dist.training.head_plan import HeadTraining
from iic_dist.training.neighbours import NeighbourTraining
from iic_dist.training.starts import ClusterStarts


class NeighbourStage:
    """Finds the neighbours of all images and trains new sub-heads of every clustering head on them.

    Args:
        config: Complete.
        features: (N, F) on the CPU, of all images, the same on all ranks.
        device: Where to compute.
        after_block: Called with a number of images while the neighbours are found, equally often on all ranks.

    Raises:
        UsageError: too few images, or features that are not finite.

    Collective: all ranks must construct it, and call its methods, together.
    """

    def __init__(
        self,
        config: Config,
        features: Tensor,
        device: torch.device,
        after_block: Callable[[int], None] | None = None,
    ) -> None:
        asked, count = config.neighbours, len(features)
        if count < 3:
            noun = noun_of(config.data.name)
            raise UsageError(f"{count} {noun}s have no neighbours to speak of: at least 3 are needed")
        self.device, self.dtype, self.features = device, config.dtype, features
        self.space = fit_space(features, device, config.dtype, after_block, asked.whitening)
        self.vectors = map_features(features, self.space, device, config.data.device_budget_gib)
        self.neighbours = find_neighbours(self.vectors, min(asked.k, count - 1), device, after_block)
        own = dataclasses.replace(
            config, loss=dataclasses.replace(config.loss, entropy_weight=config.neighbours.entropy_weight)
        )
        self.objectives = build_objectives(own, device)
        self.training = NeighbourTraining(
            self.vectors,
            self.neighbours,
            {head: (asked.sub_heads, k) for head, k in config.clustering_heads.items()},
            self.objectives,
            HeadTraining(
                steps=asked.steps,
                partners=asked.partners,
                walk=asked.walk,
                batch_size=asked.batch_size,
                lr=asked.lr,
                weight_decay=asked.weight_decay,
                seed=config.run.seed,
                impl=config.loss.impl,
            ),
            device,
            ClusterStarts(self.vectors, self.neighbours, config.run.seed),
        )

    def run(self, after_each: Callable[[int, Mapping[str, IICTerms]], None]) -> None:
        """Take the steps that are not done yet.

        Args:
            after_each: Called after each step with the number of steps done and the terms of the heads; may raise.
        """
        while self.training.step < self.training.settings.steps:
            terms = self.training.train_step()
            after_each(self.training.step, terms)

    def finish(self) -> tuple[dict[str, FeatureSubHeads], SubHeadRecord]:
        """Return the new heads, and how their sub-heads do on all pairs of neighbours."""
        heads = self.training.finished(self.space)
        judged = self.training.judge()
        shapes = {name: head.shape for name, head in heads.items()}
        record = SubHeadRecord(shapes, self.objectives, self.device, torch.float64)
        for name, terms in judged.items():
            record.add(name, terms.joint, torch.zeros((), dtype=torch.bool, device=self.device))
        record.end_pass(shapes)
        return heads, record

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on, besides the same features."""
        return self.training.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.training.load_state_dict(state)
