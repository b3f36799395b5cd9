"""Views: which random pictures are made of an image, on the device that holds it.

`ViewSpec` is the distribution of one view and `ViewParameters` what was drawn from it for each image of a
batch; `sample` draws, `apply` makes the pictures. `Views` does both for a training step, and `policy` knows
published settings by name.

A view is a pure function of (seed, epoch, index of the image, number of the view), drawn with
`iic_dist.philox`: the batch it is made in and the rank that makes it do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from iic_dist.errors import UsageError
from iic_dist.ops import augment as ops
from iic_dist.philox import uniforms

# Which uniform number decides what: fixed, so that switching one thing off leaves the others as they were.
_SIZE, _RATIO, _TOP, _LEFT, _CENTRE, _FLIP = range(6)
_AFFINE, _ANGLE, _MOVE_X, _MOVE_Y, _ZOOM, _SHEAR_X, _SHEAR_Y = range(6, 13)
_JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY, _BLUR, _SIGMA = range(13, 21)
_NUM_UNIFORMS = 21

_STRENGTHS = ("brightness", "contrast", "saturation", "hue")

# Pixels times channels that a CPU works on at a time: 1 MB an array. Measured best of 2^15 to 2^24 at 32
# pixels, 1.7 times as fast as the whole batch at once, and within 10 % of the best at 96.
_CPU_CHUNK = 2**18


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
            raise UsageError(
                f"crop_area {area} and crop_sides {self.crop_sides} exclude each other: drop one."
            )
        if len(self.mean) != len(self.std):
            raise UsageError(
                f"mean {self.mean} and std {self.std} must hold equally many numbers: give both."
            )

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

    Real numbers are float32.

    Attributes:
        affine: (B, 6) angle in degrees, shift along x and y in pixels, zoom, shear along x and y in degrees.
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


def _draw_affine(spec: ViewSpec, numbers: Tensor, height: int, width: int) -> Tensor:
    shift_x, shift_y = spec.translation * width, spec.translation * height
    drawn = (
        (_between(numbers, _ANGLE, -spec.rotation, spec.rotation), 0.0),
        (_between(numbers, _MOVE_X, -shift_x, shift_x), 0.0),
        (_between(numbers, _MOVE_Y, -shift_y, shift_y), 0.0),
        (_between(numbers, _ZOOM, *spec.zoom), 1.0),
        (_between(numbers, _SHEAR_X, -spec.shear, spec.shear), 0.0),
        (_between(numbers, _SHEAR_Y, -spec.shear, spec.shear), 0.0),
    )
    applied = numbers[:, _AFFINE] < spec.affine_probability
    return torch.stack([torch.where(applied, value, neutral) for value, neutral in drawn], dim=1)


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
    tallest, widest = area / height**2, width**2 / area  # ratios of a crop as high, as wide as the image
    least = torch.minimum(tallest.clamp(min=spec.crop_ratio[0]), widest)
    largest = torch.maximum(widest.clamp(max=spec.crop_ratio[1]), tallest)
    ratio = least * (largest / least) ** numbers[:, _RATIO]
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

    Computed in float64 and rounded to float32 at the end, so that devices agree.

    Args:
        numbers: (B, 21) uniform in [0, 1).
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


def apply(spec: ViewSpec, images: Tensor, parameters: ViewParameters, dtype: torch.dtype) -> Tensor:
    """Make the views that `parameters` describe.

    Args:
        images: (B, C, H, W) uint8.
        dtype: to compute in, float32 or float64.

    Returns:
        (B, C', size, size).
    """
    assert images.dtype == torch.uint8, images.dtype
    p = parameters
    views = images.to(dtype).div_(255.0)
    if p.affine is not None:
        angle, zoom = p.affine[:, 0], p.affine[:, 3]
        views = ops.affine(views, angle, p.affine[:, 1:3], zoom, p.affine[:, 4:6])
    if p.box is not None:
        views = ops.resized_crop(views, p.box, spec.size, p.flip)
    if p.brightness is not None:
        views = ops.adjust_brightness(views, p.brightness)
    if p.contrast is not None:
        views = ops.adjust_contrast(views, p.contrast)
    if p.saturation is not None:
        views = ops.adjust_saturation(views, p.saturation)
    if p.hue is not None:
        views = ops.adjust_hue(views, p.hue)
    if p.gray is not None:
        views = ops.adjust_saturation(
            views, 1.0 - p.gray.float()
        )  # factors 0 and 1 are exact; where is slower
    if p.sigma is not None:
        views = ops.gaussian_blur(views, p.sigma, spec.blur_kernel)
    if spec.sobel:
        views = ops.sobel(views)
    if spec.mean:
        views = ops.normalize(views, spec.mean, spec.std)
    return views


def _fill(out: Tensor, spec: ViewSpec, images: Tensor, parameters: ViewParameters) -> None:
    """Write views into `out`: all at once on an accelerator, in pieces that fit the cache on a CPU."""
    batch, channels, height, width = images.shape
    rows = max(1, batch)
    if images.device.type == "cpu":
        rows = max(1, _CPU_CHUNK // (channels * max(height * width, spec.size**2)))
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 products would blur the crop
        for start in range(0, batch, rows):
            piece = slice(start, start + rows)
            out[piece] = apply(spec, images[piece], parameters.rows(start, start + rows), dtype)


class Views:
    """The views of a training run.

    Args:
        first: distribution of the first view.
        second: distribution of each of the second views.
        evaluation: what an evaluation sees; chance in it is left out, see `ViewSpec.centred`.
        repeats: second views of each image.
        seed: seed of the run.
    """

    def __init__(
        self, first: ViewSpec, second: ViewSpec, evaluation: ViewSpec, repeats: int, seed: int
    ) -> None:
        if repeats < 1:
            raise UsageError(f"repeats must be at least 1, not {repeats}.")
        shapes = [(spec.size, spec.sobel) for spec in (first, second, evaluation)]
        if len(set(shapes)) > 1:
            raise UsageError(f"First, second and evaluation view must agree in (size, sobel), not {shapes}.")
        self.first, self.second, self.repeats, self.seed = first, second, repeats, seed
        self._centred = evaluation.centred()
        # Views of one distribution are made in one go: (spec, number of its first view, how many).
        same = first == second
        self._groups = [(first, 0, 1 + repeats)] if same else [(first, 0, 1), (second, 1, repeats)]

    @property
    def size(self) -> int:
        """Side of each view in pixels."""
        return self.first.size

    def channels(self, image_channels: int) -> int:
        """Channels of a view of an image with `image_channels`."""
        return self.first.channels(image_channels)

    @torch.no_grad()
    def training(
        self,
        images: Tensor,
        indices: Tensor,
        epoch: int,
        first_view: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Make one first view and `repeats` second views of each image.

        In float32 on a CPU, the views of an image are the same bit for bit in any batch. Elsewhere its crop
        comes from a matrix library that may round the last bit differently in a batch of another size.

        Args:
            images: (B, C, H, W) uint8.
            indices: (B,) int64 on the same device, index of each image in its data set.
            epoch: the epoch.
            first_view: number of the first view; the second views count on. Other numbers, other views.
            dtype: of the result; computed in float64 if it is that, else in float32.

        Returns:
            ((1 + repeats) * B, C', size, size): B first views, then repeat by repeat B second views.
        """
        batch, channels, height, width = images.shape
        views = torch.arange(first_view, first_view + 1 + self.repeats, device=images.device)
        # (1 + repeats, B, 21)
        numbers = uniforms(self.seed, epoch, indices, views.unsqueeze(1), _NUM_UNIFORMS)
        out = self._empty(len(views) * batch, images, dtype)
        for spec, start, count in self._groups:
            spec.check(channels, height, width)
            parameters = sample(spec, numbers[start : start + count].flatten(0, 1), height, width)
            rows = slice(start * batch, (start + count) * batch)
            _fill(out[rows], spec, images.repeat(count, 1, 1, 1), parameters)
        return out

    @torch.no_grad()
    def evaluation(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Make the one view of each image that is evaluated, (B, C, H, W) uint8 to (B, C', size, size)."""
        batch, channels, height, width = images.shape
        self._centred.check(channels, height, width)
        numbers = torch.zeros(batch, _NUM_UNIFORMS, device=images.device)
        out = self._empty(batch, images, dtype)
        _fill(out, self._centred, images, sample(self._centred, numbers, height, width))
        return out

    def _empty(self, rows: int, images: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (rows, self.channels(images.shape[1]), self.size, self.size)
        return torch.empty(shape, dtype=dtype, device=images.device)


def _iic_policy(image_size: int, channels: int) -> tuple[ViewSpec, ViewSpec]:
    """A weak crop against a strong view.

    Source: Ji et al. 2019 and the code they published: crop 20, seen at 32 (CIFAR); crop 64 (STL-10); crops
    16 to 24, seen at 24, the whole image rotated before half of them (MNIST). Other sizes in proportion.
    """
    if channels == 1:
        small, middle, large = (round(image_size * side / 28) for side in (16, 20, 24))
        weak = ViewSpec(size=large, crop_sides=(middle,), centre_probability=0.5)
        strong = ViewSpec(size=large, crop_sides=(small, middle, large), brightness=0.4, contrast=0.4)
        return weak, replace(strong, rotation=25.0, affine_probability=0.5)
    large_images = image_size >= 64
    side = round(image_size * (2 / 3 if large_images else 5 / 8))
    weak = ViewSpec(size=side if large_images else image_size, crop_sides=(side,), sobel=True)
    return weak, replace(weak, flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.125)


def _simclr_policy(image_size: int, channels: int) -> tuple[ViewSpec, ViewSpec]:
    """The same strong view twice.

    Source: Chen et al. 2020, appendix B.9 (CIFAR-10): colour distortion of strength 0.5, no blur.
    """
    spec = ViewSpec(size=image_size, crop_area=(0.2, 1.0), flip=0.5, mean=(0.5,), std=(0.25,))
    spec = replace(spec, brightness=0.4, contrast=0.4, jitter_probability=0.8)
    spec = replace(spec, saturation=0.4, hue=0.1, gray=0.2) if channels == 3 else spec
    return spec, spec


def _digits_policy(image_size: int, channels: int) -> tuple[ViewSpec, ViewSpec]:
    """The same slight distortion of a written sign twice; its mirror image would be another sign."""
    moved = ViewSpec(size=image_size, rotation=12.0, translation=0.08, zoom=(0.85, 1.15), shear=10.0)
    spec = replace(moved, brightness=0.3, contrast=0.3)
    return spec, spec


_POLICIES = {"iic": _iic_policy, "simclr": _simclr_policy, "digits": _digits_policy}


def _given(**choices: Any) -> dict[str, Any]:
    """What the user chose, with sequences as tuples."""
    chosen = {name: value for name, value in choices.items() if value is not None}
    return {name: tuple(value) if isinstance(value, Sequence) else value for name, value in chosen.items()}


def policy(
    name: str,
    *,
    image_size: int,
    channels: int,
    seed: int,
    repeats: int = 1,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_area: Sequence[float] | None = None,
    crop_sides: Sequence[int] | None = None,
    rotation: float | None = None,
    flip: float | None = None,
    jitter: float | None = None,
    gray: float | None = None,
    blur: float | None = None,
    sobel: bool | None = None,
) -> Views:
    """Build the views of a policy: `iic`, `simclr` or `digits`.

    Where it crops by sides, an evaluation sees the centre crop of the middle side, else the whole image.

    Args:
        name: the policy.
        image_size: side of the images in pixels.
        channels: 1 or 3; with 1 the policy leaves out saturation, hue and gray.
        seed: seed of the run.
        repeats: second views of each image.
        size, mean, std, crop_area, crop_sides, rotation, flip, gray, blur, sobel: as in `ViewSpec`, instead
            of what the policy says; None keeps that. The weak first view of `iic` takes the middle one of
            `crop_sides` and no `rotation`, `flip`, `jitter`, `gray` or `blur`.
        jitter: multiplies the strengths of brightness, contrast, saturation and hue; 0 switches them off.

    Raises:
        UsageError: the policy is unknown, or a choice is out of range or does not fit the images.
    """
    if name not in _POLICIES:
        raise UsageError(f"There is no policy {name!r}: choose one of {', '.join(_POLICIES)}.")
    if channels == 1 and gray:
        raise UsageError(f"gray={gray} needs colour, but the images have 1 channel: leave it out.")
    if jitter is not None and not jitter >= 0:
        raise UsageError(f"jitter multiplies the strengths and must be at least 0, not {jitter}.")
    weak, strong = _POLICIES[name](image_size, channels)
    both = _given(size=size, mean=mean, std=std, sobel=sobel)
    if crop_area is not None or crop_sides is not None:
        both |= {"crop_area": None, "crop_sides": ()} | _given(crop_area=crop_area, crop_sides=crop_sides)
    if sobel and mean is None and std is None:
        both |= {"mean": (), "std": ()}  # the policy's are those of pixels, not of gradients
    chosen = _given(rotation=rotation, flip=flip, gray=gray, blur=blur)
    if jitter is not None:
        chosen |= {strength: getattr(strong, strength) * jitter for strength in _STRENGTHS}
    second = replace(strong, **both, **chosen)
    middle = {"crop_sides": second.centred().crop_sides}
    first = second if weak == strong else replace(weak, **both | middle)
    for spec in (first, second):
        spec.check(channels, image_size, image_size)
    return Views(first, second, second, repeats, seed)
