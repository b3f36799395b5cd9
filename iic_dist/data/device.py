"""The images of a training run, resident on its device."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceImages:
    """All images as uint8 in the memory of the training device.

    Args:
        images: (M, C, H, W) uint8 on the CPU.
        device: Where they go. The constructor waits for the copy; `gather` waits for nothing.
    """

    def __init__(self, images: Tensor, device: torch.device) -> None:
        assert images.dtype == torch.uint8, f"images must be uint8, got {images.dtype}"
        assert images.ndim == 4, f"images must be (M, C, H, W), got {tuple(images.shape)}"
        self.device = device
        self.images = images.contiguous().to(device)

    def __len__(self) -> int:
        return len(self.images)

    def prefetch(self, indices: Tensor) -> None:
        """Do nothing: all images are here."""

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Say where the images of a batch are; no image is copied.

        Args:
            indices: (N,) int64 on the CPU, in [0, M).

        Returns:
            images: (M, C, H, W) uint8 on the device: all of them, not to be written to.
            rows: (N,) int64 on the device, place of each image of the batch in `images`: `indices` again.
            indices: (N,) int64 on the device, number of each image in the data set.

        Sync:
            None. On CUDA the indices go through pinned memory, so that the copy is queued on the current
            stream; torch keeps that memory until the copy is done.
        """
        if self.device.type == "cuda":
            indices = indices.pin_memory().to(self.device, non_blocking=True)
        return self.images, indices, indices
