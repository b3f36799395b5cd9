"""Heads on features that a backbone gives and does not change: a space in which cosines count, and sub-heads there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from iic_dist.models.heads import SubHeads

SCALE = 5.0
"""Length of the vectors that the sub-heads see."""


class FeatureSpace(nn.Module):
    """Maps features to vectors of one length: z = 5 n((f - mean) P), with n(x) = x / |x|.

    Args:
        mean: (F,), of the features that the space was made from.
        projection: (F, D).
    """

    def __init__(self, mean: Tensor, projection: Tensor) -> None:
        super().__init__()
        assert projection.shape[0] == mean.shape[0], f"{projection.shape}, {mean.shape}"
        # No buffers: those are averaged over the ranks in every step, as running statistics are.
        self.mean = nn.Parameter(mean, requires_grad=False)
        self.projection = nn.Parameter(projection, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the vectors (B, D) of `features` (B, F), in the dtype of the space."""
        with torch.autocast(features.device.type, enabled=False):
            centred = features.to(self.mean.dtype) - self.mean
            return functional.normalize(centred @ self.projection) * SCALE


class FeatureSubHeads(SubHeads):
    """Sub-heads behind a space of their own: features (B, F) -> logits (B, H, K).

    Args:
        space: Where they look at the features.
        num_sub_heads: H.
        num_clusters: K.
    """

    def __init__(self, space: FeatureSpace, num_sub_heads: int, num_clusters: int) -> None:
        super().__init__(space.projection.shape[1], num_sub_heads, num_clusters)
        self.space = space

    @staticmethod
    def like(state: dict[str, Tensor], prefix: str, num_clusters: int) -> FeatureSubHeads | None:
        """Build sub-heads for what a state dict holds under a prefix; None where it holds others there.

        Args:
            state: Of a network.
            prefix: Such as "heads.clustering.".
            num_clusters: K.
        """
        projection = state.get(f"{prefix}space.projection")
        if projection is None:
            return None
        space = FeatureSpace(torch.zeros_like(state[f"{prefix}space.mean"]), torch.zeros_like(projection))
        return FeatureSubHeads(space, len(state[f"{prefix}linear.bias"]) // num_clusters, num_clusters)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, H, K) of `features` (B, F)."""
        vectors = self.space(features)
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(vectors)
