"""Heads on features that a backbone gives and does not change: a space in which cosines count, and sub-heads there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from iic_dist.models.cluster_net import ClusterNet
from iic_dist.models.heads import SubHeads

SCALE = 5.0
"""Length of the vectors that the sub-heads see."""


class FeatureSpace(nn.Module):
    """Maps features to vectors of one length: z = 5 n(n((f - mean) A) P - shift), with n(x) = x / |x|.

    Args:
        mean: (F,), of the features that the space was made from.
        projection: P, (F, D).
        shift: (D,), the mean of what is projected.
        whitening: A, (F, F); None is the identity.

    Raises:
        ValueError: these shapes do not fit together.
    """

    def __init__(self, mean: Tensor, projection: Tensor, shift: Tensor, whitening: Tensor | None = None) -> None:
        super().__init__()
        square = None if whitening is None else tuple(whitening.shape)
        if projection.shape != (len(mean), len(shift)) or square not in (None, 2 * tuple(mean.shape)):
            shapes = ", ".join(str(tuple(value.shape)) for value in (mean, projection, shift))
            more = "" if square is None else f" and whitening {square}"
            raise ValueError(
                f"a space of mean, projection and shift {shapes}{more}: must be (F,), (F, D), (D,), (F, F)"
            )
        # No buffers: those are averaged over the ranks in every step, as running statistics are.
        self.mean = nn.Parameter(mean, requires_grad=False)
        self.projection = nn.Parameter(projection, requires_grad=False)
        self.shift = nn.Parameter(shift, requires_grad=False)
        self.whitening = None if whitening is None else nn.Parameter(whitening, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the vectors (B, D) of `features` (B, F), in the dtype of the space."""
        with torch.autocast(features.device.type, enabled=False):
            return functional.normalize(self.directions(features) @ self.projection - self.shift) * SCALE

    def directions(self, features: Tensor) -> Tensor:
        """Return what is projected, n((f - mean) A), (B, F)."""
        centred = features.to(self.mean.dtype) - self.mean
        return functional.normalize(centred if self.whitening is None else centred @ self.whitening)


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

    def alone(self, sub_head: int) -> FeatureSubHeads:
        """Return a head of one of the sub-heads, with the same space and a copy of its weights."""
        return self._with_weights_of(sub_head, FeatureSubHeads(self.space, 1, self.shape[1]))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, H, K) of `features` (B, F)."""
        vectors = self.space(features)
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(vectors)


def adopt_heads(model: ClusterNet, heads: Mapping[str, FeatureSubHeads]) -> None:
    """Put heads on features in the place of those with clusters; an overclustering head goes."""
    for name in model.shapes:
        del model.heads[name]
    contrastive = dict(model.heads.items())
    model.heads.clear()
    model.heads.update({**heads, **contrastive})  # the contrastive head stays the last


def keep_selected(model: ClusterNet, selected: Mapping[str, int]) -> None:
    """Leave one sub-head of each head on features.

    Args:
        model: With heads on features.
        selected: Which one, by the name of the head.
    """
    kept = {}
    for name, sub_head in selected.items():
        head = model.heads[name]
        assert isinstance(head, FeatureSubHeads)
        kept[name] = head.alone(sub_head)
    adopt_heads(model, kept)


def heads_of_state(state: Mapping[str, Tensor], clustering_heads: Mapping[str, int]) -> dict[str, FeatureSubHeads]:
    """Build the heads on features that a state dict of a network holds, to be filled from it; none where it has others.

    Args:
        state: Of a `ClusterNet`.
        clustering_heads: K of each clustering head, by its name.
    """
    heads = {}
    for name, k in clustering_heads.items():
        projection = state.get(f"heads.{name}.space.projection")
        if projection is not None:
            mean, shift = (torch.zeros_like(state[f"heads.{name}.space.{part}"]) for part in ("mean", "shift"))
            whitening = state.get(f"heads.{name}.space.whitening")
            whitening = None if whitening is None else torch.zeros_like(whitening)
            space = FeatureSpace(mean, torch.zeros_like(projection), shift, whitening)
            heads[name] = FeatureSubHeads(space, len(state[f"heads.{name}.linear.bias"]) // k, k)
    return heads


def load_network(model: ClusterNet, state: Mapping[str, Tensor], clustering_heads: Mapping[str, int]) -> None:
    """Load a state dict of any stage of a run into the network that the run began with.

    Raises:
        RuntimeError: it is not of this network.
    """
    if heads := heads_of_state(state, clustering_heads):
        place = next(model.parameters())
        adopt_heads(model, {name: head.to(place.device, place.dtype) for name, head in heads.items()})
        for name in [name for name in model.heads if not any(key.startswith(f"heads.{name}.") for key in state)]:
            del model.heads[name]
    model.load_state_dict(dict(state))
