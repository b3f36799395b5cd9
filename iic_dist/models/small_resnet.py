"""A small ResNet for a CPU: nothing is computed at full size."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from iic_dist.models.norm import Norm, conv_norm_relu

WIDTH = 32
"""Channels of the first stage; the features have four times as many."""


def small_resnet(in_channels: int, norm: Norm) -> nn.Module:
    """Build three stages of 1, 2, 4 times WIDTH channels, at 1/2, 1/4 and 1/8 of the side, then the global average.

    Each stage is a 3x3 convolution, a 2x2 max-pool but for the first, and a residual pair of 3x3 convolutions.
    """
    layers: list[nn.Module] = [_HalfSize()]
    channels = 4 * in_channels
    for factor in (1, 2, 4):
        layers += conv_norm_relu(channels, factor * WIDTH, 3, norm)
        channels = factor * WIDTH
        layers += [nn.MaxPool2d(2, ceil_mode=True)] if factor > 1 else []
        layers.append(_Residual(channels, norm))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _HalfSize(nn.Module):
    """(B, C, S, S) -> (B, 4C, S/2, S/2), 2x2 pixels as channels; an odd side gets one more row and column of 0."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the maps."""
        height, width = images.shape[2:]
        return functional.pixel_unshuffle(functional.pad(images, (0, width % 2, 0, height % 2)), 2)


class _Residual(nn.Module):
    """Two 3x3 convolutions, whose result is added to what came in."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        layers = [*conv_norm_relu(channels, channels, 3, norm), *conv_norm_relu(channels, channels, 3, norm)]
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the same shape."""
        changed: Tensor = self.layers(maps)
        return maps + changed
