"""What is drawn for each image of a batch: from uniform numbers to the parameters of its view."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from iic_dist.ops.exact import cos_sin, power
from iic_dist.views.spec import ViewSpec

# Which uniform number decides what: fixed, so that switching one thing off leaves the others as they were.
_SIZE, _RATIO, _TOP, _LEFT, _CENTRE, _FLIP = range(6)


_AFFINE, _ANGLE, _MOVE_X, _MOVE_Y, _ZOOM, _SHEAR_X, _SHEAR_Y = range(6, 13)


_JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY, _BLUR, _SIGMA = range(13, 21)


NUM_UNIFORMS = 21


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for each image of a batch; None where the spec leaves a step out.

    Real numbers are float32, and the same bits on every device: see `iic_dist.ops.exact`.

    Attributes:
        affine: (B, 6) the map from pixels of the result to pixels of the image, both from their centres:
            x' = a x + b y + c, y' = d x + e y + f as (a, b, c, d, e, f).
        box: (B, 4) top, left, height, width of the crop in pixels of the image; given wherever `flip` is.
        flip, gray: (B,) bool.
        brightness, contrast, saturation: (B,) factors, 1 where not applied.
        hue: (B,) part of the circle, 0 where not applied.
        sigma: (B,) standard deviation of the blur in pixels of the view, 0 where not applied.
    """

    affine: Tensor | None = None
    box: Tensor | None = None
    flip: Tensor | None = None
    brightness: Tensor | None = None
    contrast: Tensor | None = None
    saturation: Tensor | None = None
    hue: Tensor | None = None
    gray: Tensor | None = None
    sigma: Tensor | None = None

    def rows(self, start: int, stop: int) -> ViewParameters:
        """The parameters of images `start` to `stop` - 1."""
        drawn = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ViewParameters(**{name: value[start:stop] for name, value in drawn if value is not None})


def _between(numbers: Tensor, which: int, least: float, largest: float) -> Tensor:
    return least + numbers[:, which] * (largest - least)


def inverse_affine(
    angle: Tensor, shear_x: Tensor, shear_y: Tensor, move_x: Tensor, move_y: Tensor, zoom: Tensor
) -> Tensor:
    """Where each pixel of a moved image comes from, as `ViewParameters.affine` says.

    The inverse of torchvision's: rotate by `angle` clockwise, shear, zoom, then move.

    Args:
        angle, shear_x, shear_y: (B,) float64 in degrees.
        move_x, move_y: (B,) float64 in pixels.
        zoom: (B,) float64.

    Returns:
        (B, 6) float64.
    """
    cos, sin = cos_sin(torch.stack((angle, shear_x, shear_y)))
    tan_x, tan_y = sin[1] / cos[1], sin[2] / cos[2]
    turned_cos, turned_sin = cos[0] + sin[0] * tan_y, sin[0] - cos[0] * tan_y
    a, b = (cos[0] - turned_sin * tan_x) / zoom, (sin[0] + turned_cos * tan_x) / zoom
    d, e = -turned_sin / zoom, turned_cos / zoom
    return torch.stack((a, b, -(a * move_x + b * move_y), d, e, -(d * move_x + e * move_y)), dim=1)


def _draw_affine(spec: ViewSpec, numbers: Tensor, height: int, width: int) -> Tensor:
    shift_x, shift_y = spec.translation * width, spec.translation * height
    drawn = (
        (_between(numbers, _ANGLE, -spec.rotation, spec.rotation), 0.0),
        (_between(numbers, _SHEAR_X, -spec.shear, spec.shear), 0.0),
        (_between(numbers, _SHEAR_Y, -spec.shear, spec.shear), 0.0),
        (_between(numbers, _MOVE_X, -shift_x, shift_x), 0.0),
        (_between(numbers, _MOVE_Y, -shift_y, shift_y), 0.0),
        (_between(numbers, _ZOOM, *spec.zoom), 1.0),
    )
    applied = numbers[:, _AFFINE] < spec.affine_probability
    angle, shear_x, shear_y, *moved = (torch.where(applied, value, neutral) for value, neutral in drawn)
    return inverse_affine(angle, shear_x, shear_y, *moved)


def _draw_square(spec: ViewSpec, numbers: Tensor, height: int, width: int) -> Tensor:
    sides = sorted(spec.crop_sides)
    # The k-th side from its increments: a table would have to be sent to the device.
    side = torch.full_like(numbers[:, _SIZE], sides[0])
    for k in range(1, len(sides)):
        side += (sides[k] - sides[k - 1]) * (numbers[:, _SIZE] * len(sides) >= k)
    centred = numbers[:, _CENTRE] < spec.centre_probability
    corner = []
    for which, room in ((_TOP, height), (_LEFT, width)):
        anywhere = torch.floor(numbers[:, which] * (room - side + 1))
        corner.append(torch.where(centred, torch.round((room - side) / 2), anywhere))
    return torch.stack((*corner, side, side), dim=1)


def _draw_area(spec: ViewSpec, numbers: Tensor, height: int, width: int) -> Tensor:
    assert spec.crop_area is not None
    area = _between(numbers, _SIZE, *spec.crop_area) * (height * width)
    # Ratios of a crop as high, as wide as the image.
    tallest, widest = area * (1 / height**2), area.reciprocal() * width**2
    least = torch.minimum(tallest.clamp(min=spec.crop_ratio[0]), widest)
    largest = torch.maximum(widest.clamp(max=spec.crop_ratio[1]), tallest)
    ratio = least * power(largest / least, numbers[:, _RATIO])
    box_height, box_width = torch.sqrt(area / ratio), torch.sqrt(area * ratio)
    top = numbers[:, _TOP] * (height - box_height)
    left = numbers[:, _LEFT] * (width - box_width)
    return torch.stack((top, left, box_height, box_width), dim=1)


def _draw_jitter(spec: ViewSpec, numbers: Tensor) -> dict[str, Tensor]:
    applied = numbers[:, _JITTER] < spec.jitter_probability
    drawn: dict[str, Tensor] = {}
    for name, which in (("brightness", _BRIGHTNESS), ("contrast", _CONTRAST), ("saturation", _SATURATION)):
        strength = getattr(spec, name)
        if strength > 0.0:
            factor = _between(numbers, which, max(0.0, 1.0 - strength), 1.0 + strength)
            drawn[name] = torch.where(applied, factor, 1.0)
    if spec.hue > 0.0:
        drawn["hue"] = torch.where(applied, _between(numbers, _HUE, -spec.hue, spec.hue), 0.0)
    return drawn


def draw(spec: ViewSpec, numbers: Tensor, height: int, width: int) -> ViewParameters:
    """Turn uniform numbers into the parameters of views of images of height x width.

    Computed in float64 by correctly rounded operations and rounded to float32 at the end: every device gives the same
    bits.

    Args:
        numbers: (B, 21) uniform in [0, 1), multiples of 2^-24.
    """
    numbers = numbers.double()
    drawn = _draw_jitter(spec, numbers)
    if spec.moves:
        drawn["affine"] = _draw_affine(spec, numbers, height, width)
    if spec.crop_sides:
        drawn["box"] = _draw_square(spec, numbers, height, width)
    elif spec.crop_area is not None:
        drawn["box"] = _draw_area(spec, numbers, height, width)
    elif spec.flip > 0.0 or (height, width) != (spec.size, spec.size):
        whole = [torch.full_like(numbers[:, _SIZE], side) for side in (0, 0, height, width)]
        drawn["box"] = torch.stack(whole, dim=1)
    if spec.flip > 0.0:
        drawn["flip"] = numbers[:, _FLIP] < spec.flip
    if spec.gray > 0.0:
        drawn["gray"] = numbers[:, _GRAY] < spec.gray
    if spec.blur > 0.0:
        sigma = _between(numbers, _SIGMA, *spec.blur_sigma)
        drawn["sigma"] = torch.where(numbers[:, _BLUR] < spec.blur, sigma, 0.0)
    rounded = {name: value.float() if value.is_floating_point() else value for name, value in drawn.items()}
    return ViewParameters(**rounded)
