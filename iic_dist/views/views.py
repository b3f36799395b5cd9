"""Views: which random pictures are made of an image, on the device that holds it.

`Views` draws the parameters of a training step's views (`iic_dist.views.spec`) and makes the pictures, by the native op
(`iic_dist.ops.augment`) or by `apply` in PyTorch; `policy` knows published settings by name.

A view is a pure function of (seed, epoch, index of the image, number of the view), drawn with
`iic_dist.ops.philox`: the batch it is made in and the rank that makes it do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from iic_dist.errors import UsageError
from iic_dist.ops import images as ops
from iic_dist.ops import augment as native
from iic_dist.ops.philox import uniforms
from iic_dist.views.spec import NUM_UNIFORMS, STRENGTHS, ViewParameters, ViewSpec, sample

# Pixels times channels that a CPU works on at a time: 1 MB an array. Measured best of 2^15 to 2^24 at 32
# pixels, 1.7 times as fast as the whole batch at once, and within 10 % of the best at 96.
_CPU_CHUNK = 2**18


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
        views = ops.affine(views, p.affine)
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
        views = ops.adjust_saturation(views, 1.0 - p.gray.float())  # 0 and 1 are exact; where is slower
    if p.sigma is not None:
        views = ops.gaussian_blur(views, p.sigma, spec.blur_kernel)
    if spec.sobel:
        views = ops.sobel(views)
    if spec.mean:
        views = ops.normalize(views, spec.mean, spec.std)
    return views


def _fill(out: Tensor, spec: ViewSpec, images: Tensor, rows: Tensor, parameters: ViewParameters) -> None:
    """Write views of `images[rows]` into `out`: all at once on an accelerator, in pieces that fit a CPU's cache."""
    channels, height, width = images.shape[1:]
    size = max(1, len(rows))
    if images.device.type == "cpu":
        size = max(1, _CPU_CHUNK // (channels * max(height * width, spec.size**2)))
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 products would blur the crop
        for start in range(0, len(rows), size):
            piece = slice(start, start + size)
            chosen = images.index_select(0, rows[piece])
            out[piece] = apply(spec, chosen, parameters.rows(start, start + size), dtype)


class Views:
    """The views of a training run.

    Args:
        first: distribution of the first view.
        second: distribution of each of the second views.
        evaluation: what an evaluation sees; chance in it is left out, see `ViewSpec.centred`.
        repeats: second views of each image.
        seed: seed of the run.
        impl: auto makes them by the native op where it is built, but for float64; fused insists; torch is PyTorch.
    """

    def __init__(
        self, first: ViewSpec, second: ViewSpec, evaluation: ViewSpec, repeats: int, seed: int, impl: str = "auto"
    ) -> None:
        if repeats < 1:
            raise UsageError(f"repeats must be at least 1, not {repeats}.")
        shapes = [(spec.size, spec.sobel, spec.mean, spec.std) for spec in (first, second, evaluation)]
        if len(set(shapes)) > 1:
            raise UsageError(f"First, second and evaluation view must agree in (size, sobel, mean, std), not {shapes}.")
        self.first, self.second, self.repeats, self.seed, self.impl = first, second, repeats, seed, impl
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
        rows: Tensor,
        indices: Tensor,
        epoch: int,
        first_view: int = 0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Tensor:
        """Make one first view and `repeats` second views of each image.

        The native op makes the views of an image the same bit for bit in any batch, and so does PyTorch in float32 on a
        CPU. Elsewhere its crop comes from a matrix library that may round the last bit differently in a batch of
        another size.

        Args:
            images: (M, C, H, W) uint8.
            rows: (B,) int64 on the same device, place of each image of the batch in `images`.
            indices: (B,) int64 on the same device, its index in the data set, which decides what is drawn.
            epoch: the epoch.
            first_view: number of the first view; the second views count on. Other numbers, other views.
            dtype: of the result; computed in float64 if it is that, else in float32.
            channels_last: memory format of the result.

        Returns:
            ((1 + repeats) * B, C', size, size): B first views, then repeat by repeat B second views.

        Raises:
            RuntimeError: impl="fused", and the native op is not there for this device or dtype; says why.
        """
        views = torch.arange(first_view, first_view + 1 + self.repeats, device=images.device)
        # (1 + repeats, B, 21)
        numbers = uniforms(self.seed, epoch, indices, views.unsqueeze(1), NUM_UNIFORMS)
        groups = [(spec, numbers[start : start + count]) for spec, start, count in self._groups]
        return self._make(images, rows, groups, dtype, channels_last)

    @torch.no_grad()
    def evaluation(
        self, images: Tensor, rows: Tensor, dtype: torch.dtype = torch.float32, channels_last: bool = False
    ) -> Tensor:
        """Make the one view of each image that is evaluated.

        Args:
            images, rows, dtype, channels_last: as in `training`.

        Returns:
            (B, C', size, size).
        """
        numbers = torch.zeros(1, len(rows), NUM_UNIFORMS, device=images.device)
        return self._make(images, rows, [(self._centred, numbers)], dtype, channels_last)

    def _make(
        self,
        images: Tensor,
        rows: Tensor,
        groups: Sequence[tuple[ViewSpec, Tensor]],
        dtype: torch.dtype,
        channels_last: bool,
    ) -> Tensor:
        """Make the views of each distribution from its uniform numbers (views, B, 21), one behind the other."""
        channels, height, width = images.shape[1:]
        drawn = []
        for spec, numbers in groups:
            spec.check(channels, height, width)
            drawn.append(sample(spec, numbers.flatten(0, 1), height, width))
        counts = [len(numbers) * len(rows) for _, numbers in groups]
        if native.supported(self.impl, images.device, dtype):
            tables = [
                native.table(vars(parameters), count, height, width, images.device)
                for parameters, count in zip(drawn, counts, strict=True)
            ]
            return native.augment_views(
                images,
                rows,
                torch.cat(tables),
                size=self.size,
                blur_kernel=self.first.blur_kernel if any(spec.blur > 0.0 for spec, _ in groups) else 1,
                sobel=self.first.sobel,
                mean=self.first.mean,
                std=self.first.std,
                dtype=dtype,
                channels_last=channels_last,
            )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        shape = (sum(counts), self.channels(channels), self.size, self.size)
        views = torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)
        parts = views.split(counts)
        for (spec, numbers), parameters, part in zip(groups, drawn, parts, strict=True):
            _fill(part, spec, images, rows.repeat(len(numbers)), parameters)
        return views


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
    return Views(first, second, second, repeats, seed, impl)
