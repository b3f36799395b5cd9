"""Views: which random pictures are made of an image, on the device that holds it.

`Views` draws the parameters of a training step's views (`iic_dist.views.draw`) and makes the pictures, by the native op
(`iic_dist.ops.augment`) or by `iic_dist.views.apply` in PyTorch; `iic_dist.views.policies` knows published settings.

A view is a pure function of (seed, epoch, index of the image, number of the view), drawn with
`iic_dist.ops.philox`: the batch it is made in and the rank that makes it do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from iic_dist.errors import UsageError
from iic_dist.ops import augment as native
from iic_dist.ops.philox import uniforms
from iic_dist.views.apply import fill
from iic_dist.views.draw import NUM_UNIFORMS, draw
from iic_dist.views.spec import ViewSpec


class Views:
    """The views of a training run.

    Args:
        first: distribution of the first view.
        second: distribution of each of the second views.
        evaluation: what an evaluation sees, maybe of another size; chance in it is left out, see `ViewSpec.centred`.
        repeats: second views of each image.
        seed: seed of the run.
        impl: auto makes them by the native op where it is built, but for float64; fused insists; torch is PyTorch.

    Attributes:
        destination: Where views are taken after they are made; None leaves them where the images are.
        seen: what an evaluation sees.
    """

    def __init__(
        self, first: ViewSpec, second: ViewSpec, evaluation: ViewSpec, repeats: int, seed: int, impl: str = "auto"
    ) -> None:
        if repeats < 1:
            raise UsageError(f"repeats must be at least 1, not {repeats}.")
        shapes = [(spec.sobel, spec.mean, spec.std) for spec in (first, second, evaluation)]
        if first.size != second.size or len(set(shapes)) > 1:
            raise UsageError(
                "First and second view must agree in size, and all with the evaluation view in (sobel, mean, std), not "
                f"{first.size}, {second.size} and {shapes}."
            )
        self.first, self.second, self.repeats, self.seed, self.impl = first, second, repeats, seed, impl
        self.destination: torch.device | None = None
        self.seen = evaluation.centred()
        # Views of one distribution are made in one go: (spec, number of its first view, how many).
        same = first == second
        self._groups = [(first, 0, 1 + repeats)] if same else [(first, 0, 1), (second, 1, repeats)]

    @property
    def size(self) -> int:
        """Side of each view of a training in pixels."""
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
        return self._made(images, rows, groups, dtype, channels_last)

    @torch.no_grad()
    def evaluation(
        self,
        images: Tensor,
        rows: Tensor,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        size: int | None = None,
    ) -> Tensor:
        """Make the one view of each image that is evaluated.

        Args:
            images, rows, dtype, channels_last: as in `training`.
            size: side of the view; None for that of the evaluation.

        Returns:
            (B, C', size, size).
        """
        spec = self.seen if size is None else replace(self.seen, size=size)
        numbers = torch.zeros(1, len(rows), NUM_UNIFORMS, device=images.device)
        return self._made(images, rows, [(spec, numbers)], dtype, channels_last)

    def _made(
        self,
        images: Tensor,
        rows: Tensor,
        groups: Sequence[tuple[ViewSpec, Tensor]],
        dtype: torch.dtype,
        channels_last: bool,
    ) -> Tensor:
        views = self._make(images, rows, groups, dtype, channels_last)
        return views if self.destination is None else views.to(self.destination)

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
        size = groups[0][0].size
        drawn = []
        for spec, numbers in groups:
            spec.check(channels, height, width)
            drawn.append(draw(spec, numbers.flatten(0, 1), height, width))
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
                size=size,
                blur_kernel=self.first.blur_kernel if any(spec.blur > 0.0 for spec, _ in groups) else 1,
                sobel=self.first.sobel,
                mean=self.first.mean,
                std=self.first.std,
                dtype=dtype,
                channels_last=channels_last,
            )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        shape = (sum(counts), self.channels(channels), size, size)
        views = torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)
        parts = views.split(counts)
        for (spec, numbers), parameters, part in zip(groups, drawn, parts, strict=True):
            fill(part, spec, images, rows.repeat(len(numbers)), parameters)
        return views
