"""Every step that a view can have, in one table: for what must meet all of them at once.

Of colour images and of gray ones; `replace` gives another size, Sobel gradients, or less. It needs only torch.
"""

from __future__ import annotations

from dataclasses import replace

from iic_dist.views.spec import ViewSpec

EVERYTHING = ViewSpec(
    size=32,
    crop_area=(0.1, 1.0),
    rotation=30.0,
    translation=0.1,
    zoom=(0.7, 1.4),
    shear=10.0,
    affine_probability=0.5,
    flip=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.2,
    jitter_probability=0.8,
    gray=0.2,
    blur=0.5,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)
GRAY = replace(EVERYTHING, saturation=0.0, hue=0.0, gray=0.0, mean=(0.4,), std=(0.2,))
