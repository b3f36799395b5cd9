"""The network that is trained: one backbone, several heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from iic_dist.errors import UsageError
from iic_dist.models.heads import SubHeads


class ClusterNet(nn.Module):
    """A backbone and named heads on its features.

    Args:
        backbone: (B, C, S, S) -> (B, F).
        heads: by name ("clustering", "overclustering", "contrastive"), each a function of (B, F).
        freeze_backbone: keep the backbone as it is: evaluation mode, no gradient, also in training.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module], freeze_backbone: bool = False) -> None:
        super().__init__()
        if not heads:
            raise UsageError("a network without heads has nothing to train: give it at least one")
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            backbone.requires_grad_(False)  # so that DDP and the optimiser leave it out
            backbone.eval()

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(H, K) of each head with clusters, by its name."""
        return {name: head.shape for name, head in self.heads.items() if isinstance(head, SubHeads)}

    @property
    def num_features(self) -> int:
        """F of the backbone."""
        features = self.backbone.num_features
        assert isinstance(features, int)
        return features

    def train(self, mode: bool = True) -> ClusterNet:
        """Switch to training mode, but for a frozen backbone."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor, heads: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Run the backbone once and the named heads on its features.

        Args:
            images: (B, C, S, S).
            heads: which heads to run; None for all.

        Returns:
            The output of each head by name, in the order asked for.
        """
        names = list(self.heads) if heads is None else heads
        unknown = [name for name in names if name not in self.heads]
        if unknown:
            raise UsageError(f"no head {unknown[0]!r}: this network has {', '.join(self.heads)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            features = self.backbone(images)
        return {name: self.heads[name](features) for name in names}
