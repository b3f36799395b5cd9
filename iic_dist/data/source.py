"""Where the images of a run lie, behind one way to ask for a batch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from iic_dist.data.device import DeviceImages
from iic_dist.data.host import HostImages


class ImageSource(Protocol):
    """Images of which a device gets batches; the pixels of a batch do not depend on where the images lie."""

    def __len__(self) -> int:
        """M, the number of images."""
        ...

    def prefetch(self, indices: Tensor) -> None:
        """Say which batch is asked for next, (N,) int64 on the CPU, so that it can be on its way."""
        ...

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bring a batch to the device.

        Args:
            indices: (N,) int64 on the CPU, in [0, M).

        Returns:
            images: (M or N, C, H, W) uint8 on the device; not to be written to.
            rows: (N,) int64 on the device, place of each image of the batch in `images`.
            indices: (N,) int64 on the device, number of each image in the data set.
        """
        ...


def place_images(images: Tensor, device: torch.device, budget_gib: float) -> ImageSource:
    """Keep images on the device if they fit the budget, else on the host.

    Args:
        images: (M, C, H, W) uint8 on the CPU, in memory or mapped into it.
        device: Where batches are asked for.
        budget_gib: Memory that the images may take there, in GiB.
    """
    return DeviceImages(images, device) if images.nbytes <= budget_gib * 2**30 else HostImages(images, device)
