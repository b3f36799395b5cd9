"""The choice of normalisation, shared by backbones and heads."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import nn

from iic_dist.errors import UsageError

Norm = Literal["batch", "group", "none"]

_CHANNELS_PER_GROUP = 16  # Wu & He, arXiv:1803.08494, table 3: as good as 32 groups, and it suits narrow layers


def check_norm(norm: str) -> None:
    """Raise a UsageError unless `norm` is one of ours."""
    if norm not in get_args(Norm):
        raise UsageError(f"norm is {norm!r}: use one of {', '.join(get_args(Norm))}")


def group_norm(channels: int) -> nn.Module:
    """Return a GroupNorm of 16 channels a group, fewer where 16 does not divide `channels`."""
    return nn.GroupNorm(channels // math.gcd(channels, _CHANNELS_PER_GROUP), channels)


def norm_2d(norm: Norm, channels: int) -> nn.Module:
    """Return the normalisation of a (B, channels, H, W) map; "none" gives an Identity."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            return group_norm(channels)
        case "none":
            return nn.Identity()


def norm_1d(norm: Norm, features: int) -> nn.Module:
    """Return the normalisation of (B, features) rows; "none" gives an Identity."""
    return nn.BatchNorm1d(features) if norm == "batch" else norm_2d(norm, features)
