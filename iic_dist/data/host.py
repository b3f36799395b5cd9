"""The images of a training run that stay on the host: each batch is copied while the step before it runs."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Batch:
    """A batch on the device, or on its way there.

    Attributes:
        images: (N, C, H, W) uint8 on the device.
        indices: (N,) int64 on the device.
        copied: What the device must wait for; None on the CPU.
    """

    images: Tensor
    indices: Tensor
    copied: torch.cuda.Event | None


class HostImages:
    """All images as uint8 in the host's memory, or mapped into it from a file that it need not hold.

    A thread gathers a batch into a buffer of its own. On CUDA that buffer is pinned, and a stream of its own copies it,
    so that neither reading nor copying delays a step that `prefetch` runs ahead of. torch's allocators keep the buffers
    of the last batches, here and on the device, until they are read, and use them again: two of each while batches
    are asked for one ahead.

    Args:
        images: (M, C, H, W) uint8 on the CPU, contiguous; must not change.
        device: Where batches go.
    """

    def __init__(self, images: Tensor, device: torch.device) -> None:
        assert images.dtype == torch.uint8, f"images must be uint8, got {images.dtype}"
        assert images.ndim == 4, f"images must be (M, C, H, W), got {tuple(images.shape)}"
        self.device = device
        self.images = images
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gather")
        self._ahead: deque[tuple[Tensor, Future[_Batch]]] = deque()

    def __len__(self) -> int:
        return len(self.images)

    def prefetch(self, indices: Tensor) -> None:
        """Begin to bring a batch to the device; returns at once.

        Args:
            indices: (N,) int64 on the CPU, in [0, M). Batches are to be gathered in the order of their prefetches.
        """
        self._ahead.append((indices, self._thread.submit(self._bring, indices)))

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bring a batch to the device; batches that were prefetched before it and not gathered are dropped.

        Args:
            indices: (N,) int64 on the CPU, in [0, M).

        Returns:
            images: (N, C, H, W) uint8 on the device, a copy.
            rows: (N,) int64 on the device: 0 to N - 1.
            indices: (N,) int64 on the device, number of each image in the data set.

        Sync:
            Waits for the thread, not for the device: the current stream waits for the copy.
        """
        batch = self._prefetched(indices) or self._thread.submit(self._bring, indices).result()
        if batch.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(batch.copied)
            for tensor in (batch.images, batch.indices):
                tensor.record_stream(stream)  # or the side stream would write the next batch while this one is read
        return batch.images, torch.arange(len(indices), device=self.device), batch.indices

    def _prefetched(self, indices: Tensor) -> _Batch | None:
        while self._ahead:
            wanted, batch = self._ahead.popleft()
            if torch.equal(wanted, indices):
                return batch.result()
        return None

    def _bring(self, indices: Tensor) -> _Batch:
        """Gather a batch, and queue its copy; runs in the thread."""
        if self._stream is None:
            return _Batch(self.images.index_select(0, indices), indices, None)
        with torch.cuda.stream(self._stream):
            images = torch.empty((len(indices), *self.images.shape[1:]), dtype=torch.uint8, pin_memory=True)
            torch.index_select(self.images, 0, indices, out=images)
            copies = [host.to(self.device, non_blocking=True) for host in (images, indices.pin_memory())]
            return _Batch(copies[0], copies[1], self._stream.record_event())
