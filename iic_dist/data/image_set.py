"""A set of images in memory, or mapped into it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with, where they are known, their labels.

    Attributes:
        name: What it was loaded by, such as "digits" or "folder:photos".
        images: (M, C, H, W) uint8 on the CPU, contiguous; C is 1 (gray) or 3 (RGB). A folder's are mapped from a
            file and may be more than the memory holds: take what you need, and never write to them.
        labels: (M,) int64, or None where nothing is labelled. -1: this image has no label, ignore it.
        class_names: The name of class i at place i; empty without labels.
        paths: Of a folder's images, the path of each below the folder; empty for a named set.
        checksum: Of a folder's images and their paths, from 0 to 2^32 - 1; 0 for a named set.
    """

    name: str
    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    paths: tuple[str, ...] = ()
    checksum: int = 0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of labelled classes; 0 without labels."""
        return len(self.class_names)

    def with_channels(self, channels: int) -> ImageSet:
        """Return the set in gray (1) or RGB (3); see `to_channels`."""
        return replace(self, images=to_channels(self.images, channels))


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Make images gray or RGB as Pillow does: gray is the luma (ITU-R 601), RGB of a gray image has it three times.

    Args:
        images: (..., C, H, W) uint8, C is 1 or 3.
        channels: 1 or 3.

    Returns:
        (..., channels, H, W) uint8; a gray image comes back from RGB unchanged. `images` itself where nothing is to do.
    """
    if images.shape[-3] == channels:
        return images
    if channels == 3:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    red, green, blue = (plane.int() for plane in images.split(1, dim=-3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(images.dtype)
