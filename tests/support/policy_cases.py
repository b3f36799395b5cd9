"""The policies as the tests of views try them, and images for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from view_specs import EVERYTHING

from iic_dist.views.policies import policy
from iic_dist.views.views import Views

GENTLE = replace(
    EVERYTHING,
    size=12,
    crop_area=(0.3, 1.0),
    rotation=20.0,
    zoom=(0.9, 1.1),
    shear=5.0,
    affine_probability=0.7,
    hue=0.1,
)
"""Every step that a view can take, none of it far."""
POLICIES = [
    pytest.param("digits", 1, 8, {}, id="digits"),
    pytest.param("iic", 1, 28, {}, id="iic-mnist"),
    pytest.param("iic", 3, 32, {}, id="iic-cifar"),
    pytest.param("iic", 3, 96, {}, id="iic-stl10"),
    pytest.param("simclr", 3, 32, {"blur": 0.5}, id="simclr"),
    pytest.param("simclr", 3, 96, {"size": 64}, id="simclr-stl10"),
    pytest.param("simclr", 1, 28, {"rotation": 10}, id="simclr-gray"),
]
every_policy = pytest.mark.parametrize(("name", "channels", "side", "options"), POLICIES)


def pictures(batch: int, channels: int, height: int, width: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, height, width or height)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def build(name: str, channels: int, side: int, options: dict[str, Any], **more: Any) -> Views:
    return policy(name, image_size=side, channels=channels, **({"seed": 0} | options | more))
