"""Assign the images of a set to clusters, each rank its share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iic_dist import distributed
from iic_dist.data.source import ImageSource
from iic_dist.models import ClusterNet
from iic_dist.views.views import Views


@dataclass(frozen=True)
class Assignments:
    """What a head with clusters says of one rank's share of M images.

    Attributes:
        shares: Number of images of each rank, in rank order; together all M.
        indices: (m,) int64 on the CPU, this rank's images.
        clusters: (m, H) int64, the likeliest cluster by each sub-head.
        confidence: (m, H) float32 in (0, 1], its probability.
    """

    shares: list[int]
    indices: Tensor
    clusters: Tensor
    confidence: Tensor

    def gathered(self, sub_head: int) -> tuple[Tensor, Tensor]:
        """Return clusters and confidence of all M images by one sub-head, (M,) each.

        Collective: all ranks must call; gathers M integers and M floats.
        """
        columns = (self.clusters[:, sub_head], self.confidence[:, sub_head])
        clusters, confidence = (distributed.gather_rows(column, self.shares) for column in columns)
        return clusters, confidence


@torch.no_grad()
def embed(
    model: ClusterNet, views: Views, images: Tensor, *, batch_size: int = 250, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the features of the backbone in evaluation mode, (N, F) float32 on the CPU.

    Args:
        model: As in `assign`.
        views: As in `assign`.
        images: (N, C, H, W) uint8 on the model's device.
        batch_size: Images of one forward pass.
        dtype: Of the network's input.
    """
    was_training = model.training
    model.eval()
    places = torch.arange(len(images), device=images.device)
    features = [model.backbone(views.evaluation(images, rows, dtype=dtype)) for rows in places.split(batch_size)]
    model.train(was_training)
    return torch.cat(features).float().cpu()


@torch.no_grad()
def assign(
    model: ClusterNet,
    views: Views,
    images: ImageSource,
    heads: Sequence[str],
    *,
    batch_size: int = 1000,
    dtype: torch.dtype = torch.float32,
    after_each: Callable[[], None] | None = None,
) -> dict[str, Assignments]:
    """Run heads with clusters in evaluation mode over this rank's share of the images.

    Args:
        model: Not wrapped in DDP; its mode is restored.
        views: `views.evaluation` makes the input.
        images: All M images, for every rank.
        heads: Which heads.
        batch_size: Images of one forward pass.
        dtype: Of the network's input.
        after_each: Called after every forward pass, equally often on all ranks; may raise to end it here.
    """
    world_size, rank = distributed.world_size(), distributed.rank()
    bounds = [len(images) * r // world_size for r in range(world_size + 1)]
    own = torch.arange(bounds[rank], bounds[rank + 1])
    shares = [stop - start for start, stop in itertools.pairwise(bounds)]
    was_training = model.training
    model.eval()
    parts = []
    try:
        batches = [own[first : first + batch_size] for first in range(0, max(shares), batch_size)]
        for number, indices in enumerate(batches):  # the last may be of no images
            pixels, rows, _ = images.gather(indices)
            if number + 1 < len(batches):
                images.prefetch(batches[number + 1])
            logits = model(views.evaluation(pixels, rows, dtype=dtype), heads)
            parts.append({head: torch.softmax(logits[head].float(), -1).max(-1) for head in heads})
            if after_each is not None:
                after_each()
    finally:
        model.train(was_training)
    assigned = {}
    for head in heads:
        confidence, clusters = (torch.cat(column) for column in zip(*(part[head] for part in parts), strict=True))
        assigned[head] = Assignments(shares, own, clusters, confidence)
    return assigned
