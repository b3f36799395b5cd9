"""The backbone of a run on features of a file: none."""

from __future__ import annotations

from torch import Tensor, nn


class GivenFeatures(nn.Module):
    """Takes features (B, F) for images.

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features
