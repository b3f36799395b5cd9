"""The distribution of one view, and what is drawn from it for each image of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from iic_dist.errors import UsageError

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
