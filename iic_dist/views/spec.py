"""The distribution of one view, and what is drawn from it for each image of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from iic_dist.errors import UsageError
from iic_dist.ops.exact import cos_sin, power

# Which uniform number decides what: fixed, so that switching one thing off leaves the others as they were.
_SIZE, _RATIO, _TOP, _LEFT, _CENTRE, _FLIP = range(6)
_AFFINE, _ANGLE, _MOVE_X, _MOVE_Y, _ZOOM, _SHEAR_X, _SHEAR_Y = range(6, 13)
_JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY, _BLUR, _SIGMA = range(13, 21)
NUM_UNIFORMS = 21

STRENGTHS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """The distribution of one view. What is at its default is not computed.

    The order is: affine, crop and resize, flip, brightness, contrast, saturation, hue, gray, blur, Sobel,
    normalise. (torchvision's ColorJitter shuffles its four; here they keep their order.)

    Attributes:
        size: side of the view in pixels.
        crop_area: least and largest share of the image's area that a crop covers, uniform; None for no such
            crop. The logarithm of width / height is uniform over that part of `crop_ratio` that fits into the
            image. (torchvision draws up to ten times until a crop fits, then rounds it to pixels; here each
            draw fits, and sides and place are fractions of pixels.)
        crop_ratio: least and largest width / height of such a crop.
        crop_sides: sides in pixels of square crops; one is chosen, at whole pixels. Empty for none.
        centre_probability: how often a crop of `crop_sides` lies in the centre instead of anywhere.
        rotation: largest angle either way, degrees.
        translation: largest shift either way, share of the image's side.
        zoom: least and largest magnification.
        shear: largest angle either way, along x and along y, degrees.
        affine_probability: how often these four are applied at all.
        flip: probability of a horizontal flip.
        brightness, contrast, saturation: the factor is uniform in [max(0, 1 - value), 1 + value].
        hue: the turn is uniform in [-hue, hue], at most 0.5 of the circle.
        jitter_probability: how often these four are applied at all.
        gray: probability of a gray view (with the channels it had).
        blur: probability of a Gaussian blur; its kernel is a tenth of the size, at least 3 pixels.
        blur_sigma: least and largest standard deviation, pixels.
        sobel: replace the channels by the two Sobel gradients of the gray image.
        mean, std: normalisation, one number for each channel of the view or one for all. Empty for none.
    """

    size: int
    crop_area: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_sides: tuple[int, ...] = ()
    centre_probability: float = 0.0
    rotation: float = 0.0
    translation: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    affine_probability: float = 1.0
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 1.0
    gray: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    sobel: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        def require(valid: bool, name: str, rule: str) -> None:
            if not valid:
                raise UsageError(f"{name} must be {rule}, not {getattr(self, name)!r}.")

        def ordered(pair: tuple[float, ...], largest: float) -> bool:
            return len(pair) == 2 and 0.0 < pair[0] <= pair[1] <= largest

        require(self.size >= 2, "size", "at least 2 pixels")
        area = self.crop_area
        require(area is None or ordered(area, 1.0), "crop_area", "two shares, 0 < least <= largest <= 1")
        require(all(side >= 1 for side in self.crop_sides), "crop_sides", "numbers of pixels, at least 1")
        for name in ("crop_ratio", "zoom", "blur_sigma"):
            require(ordered(getattr(self, name), math.inf), name, "two numbers, 0 < least <= largest")
        for name in (
            "centre_probability",
            "affine_probability",
            "flip",
            "jitter_probability",
            "gray",
            "blur",
        ):
            require(0.0 <= getattr(self, name) <= 1.0, name, "a probability in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            require(0.0 <= getattr(self, name) < math.inf, name, "at least 0")
        require(0.0 <= self.hue <= 0.5, "hue", "in [0, 0.5] of the circle")
        require(0.0 <= self.rotation <= 180.0, "rotation", "in [0, 180] degrees")
        require(0.0 <= self.translation <= 1.0, "translation", "a share of the image in [0, 1]")
        require(0.0 <= self.shear <= 60.0, "shear", "in [0, 60] degrees")
        require(all(value > 0.0 for value in self.std), "std", "above 0 in each channel")
        if area is not None and self.crop_sides:
            raise UsageError(f"crop_area {area} and crop_sides {self.crop_sides} exclude each other: drop one.")
        if len(self.mean) != len(self.std):
            raise UsageError(f"mean {self.mean} and std {self.std} must hold equally many numbers: give both.")

    @property
    def moves(self) -> bool:
        """Whether there is an affine part."""
        return bool(self.rotation or self.translation or self.shear or self.zoom != (1.0, 1.0))

    @property
    def blur_kernel(self) -> int:
        """Side of the blur's kernel in pixels, odd."""
        return max(3, self.size // 10 | 1)

    def channels(self, image_channels: int) -> int:
        """Channels of a view of an image with `image_channels`."""
        return 2 if self.sobel else image_channels

    def centred(self) -> ViewSpec:
        """The view without chance: the middle one of `crop_sides` in the centre, or else the whole image."""
        sides = sorted(self.crop_sides)
        return ViewSpec(
            size=self.size,
            crop_sides=(sides[len(sides) // 2],) if sides else (),
            centre_probability=1.0,
            sobel=self.sobel,
            mean=self.mean,
            std=self.std,
        )

    def check(self, channels: int, height: int, width: int) -> None:
        """Raise UsageError if views of images of this shape cannot be made."""
        if channels not in (1, 3):
            raise UsageError(f"Views need images of 1 or 3 channels, not {channels}: make them gray or RGB.")
        if self.crop_sides and max(self.crop_sides) > min(height, width):
            raise UsageError(
                f"A crop of {max(self.crop_sides)} pixels does not fit into images of {height} x {width}: "
                "choose smaller crop_sides."
            )
        colour = [name for name in ("saturation", "hue", "gray") if getattr(self, name) > 0.0]
        if channels == 1 and colour:
            raise UsageError(f"Images of 1 channel have no colour to change: set {', '.join(colour)} to 0.")
        wanted = self.channels(channels)
        if len(self.mean) not in (0, 1, wanted):
            raise UsageError(
                f"mean {self.mean} and std {self.std} must hold 1 number or {wanted}, one for each channel "
                f"of the views{' (Sobel gradients)' if self.sobel else ''}."
            )


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


def sample(spec: ViewSpec, numbers: Tensor, height: int, width: int) -> ViewParameters:
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
