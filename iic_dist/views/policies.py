"""Published ways to make views, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from iic_dist.errors import UsageError
from iic_dist.views.spec import STRENGTHS, ViewSpec
from iic_dist.views.views import Views


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
    evaluate_size: int | None = None,
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
    impl: str = "auto",
) -> Views:
    """Build the views of a policy: `iic`, `simclr` or `digits`.

    Where it crops by sides, an evaluation sees the centre crop of the middle side, else the whole image.

    Args:
        name: the policy.
        image_size: side of the images in pixels.
        channels: 1 or 3; with 1 the policy leaves out saturation, hue and gray.
        seed: seed of the run.
        repeats: second views of each image.
        evaluate_size: side of what an evaluation sees; None for that of the views.
        size, mean, std, crop_area, crop_sides, rotation, flip, gray, blur, sobel: as in `ViewSpec`, instead
            of what the policy says; None keeps that. The weak first view of `iic` takes the middle one of
            `crop_sides` and no `rotation`, `flip`, `jitter`, `gray` or `blur`.
        jitter: multiplies the strengths of brightness, contrast, saturation and hue; 0 switches them off.
        impl: as in `Views`.

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
        chosen |= {strength: getattr(strong, strength) * jitter for strength in STRENGTHS}
    second = replace(strong, **both, **chosen)
    middle = {"crop_sides": second.centred().crop_sides}
    first = second if weak == strong else replace(weak, **both | middle)
    for spec in (first, second):
        spec.check(channels, image_size, image_size)
    seen = second if evaluate_size is None else replace(second, size=evaluate_size)
    return Views(first, second, seen, repeats, seed, impl)
