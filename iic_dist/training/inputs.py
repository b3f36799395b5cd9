"""What goes into a step: the views that each group of heads is trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iic_dist.config import Config
from iic_dist.data.sampler import Batch
from iic_dist.data.source import ImageSource
from iic_dist.training.neighbours import draw_partners
from iic_dist.views.views import Views


class Inputs:
    """Makes the views of a batch, as the stage wants them.

    Args:
        config: Complete.
        views: Of the run.
        images: All images.

    Attributes:
        neighbours: (N, k) int64 on the CPU, of each image, where the last stage compares an image with them.
    """

    def __init__(self, config: Config, views: Views, images: ImageSource) -> None:
        self.config, self.views, self.images = config, views, images
        self.neighbours: Tensor | None = None

    def of_views(self, heads: Sequence[str], batch: Batch, first_view: int) -> list[tuple[Sequence[str], Tensor]]:
        """Make the first view and the second views of each image, (views * N, C, S, S), for all heads."""
        return [(heads, self._make(batch, first_view))]

    def of_refinement(self, heads: Sequence[str], batch: Batch) -> list[tuple[Sequence[str], Tensor]]:
        """Make the pairs of the last stage for the heads with clusters, and two views for a contrastive one."""
        own = self._make(batch, 0)
        first, second = own.tensor_split([len(batch.indices)])
        if self.config.refine.towards == "labels":
            images, rows, _ = self.images.gather(batch.indices)
            plain = self.views.evaluation(
                images, rows, self.config.dtype, bool(self.config.train.channels_last), self.views.size
            )
            pairs = torch.cat([plain, second])
        else:
            assert self.neighbours is not None
            partners = draw_partners(self.neighbours, batch.indices, self.config.run.seed, batch.epoch, 1)
            theirs = self._make(Batch(batch.epoch, partners), 0)
            pairs = torch.cat([first, theirs[len(partners) :]])
        groups: list[tuple[Sequence[str], Tensor]] = [([head for head in heads if head != "contrastive"], pairs)]
        return groups if "contrastive" not in heads else [*groups, (["contrastive"], own)]

    def _make(self, batch: Batch, first_view: int) -> Tensor:
        images, rows, indices = self.images.gather(batch.indices)
        layout = bool(self.config.train.channels_last)
        return self.views.training(
            images, rows, indices, batch.epoch, first_view, dtype=self.config.dtype, channels_last=layout
        )
