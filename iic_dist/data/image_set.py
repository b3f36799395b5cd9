"""A set of images in memory, or mapped into it."""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def num_classes(self) -> int:
        """Number of labelled classes; 0 without labels."""
        return len(self.class_names)
