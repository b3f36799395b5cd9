"""Images on the host: the same batches as from the device, brought ahead in the order that was asked for."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from iic_dist.data.device import DeviceImages
from iic_dist.data.host import HostImages
from iic_dist.data.source import place_images

CPU = torch.device("cpu")


def numbered(count: int) -> torch.Tensor:
    """Images whose every byte is different, as far as a byte goes."""
    return torch.arange(count * 3 * 4 * 5).remainder(251).to(torch.uint8).reshape(count, 3, 4, 5)


def test_gather_brings_the_images_at_the_indices():
    host = HostImages(numbered(11), CPU)
    assert len(host) == 11
    images, rows, indices = host.gather(torch.tensor([10, 0, 3, 3]))
    assert torch.equal(images[rows], numbered(11)[[10, 0, 3, 3]])
    assert images.shape == (4, 3, 4, 5)
    assert images.dtype == torch.uint8
    assert rows.tolist() == [0, 1, 2, 3]
    assert indices.tolist() == [10, 0, 3, 3]


def test_the_same_pixels_and_numbers_as_from_the_device():
    wanted = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20]
    answers = [source(numbered(50), CPU).gather(wanted) for source in (DeviceImages, HostImages)]
    one, other = ((images[rows], indices) for images, rows, indices in answers)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_images_mapped_from_a_file(tmp_path):
    numbered(30).numpy().tofile(tmp_path / "x")
    mapped = torch.from_numpy(np.memmap(tmp_path / "x", np.uint8, mode="c", shape=(30, 3, 4, 5)))
    host = HostImages(mapped, CPU)
    host.prefetch(torch.tensor([29, 1]))
    images, rows, _ = host.gather(torch.tensor([29, 1]))
    assert torch.equal(images[rows], numbered(30)[[29, 1]])


class Watched(HostImages):
    """Notes what is gathered and by which thread; waits for `gate` before it."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__(images, CPU)
        self.gate = threading.Event()
        self.gathered: list[list[int]] = []
        self.threads: set[threading.Thread] = set()

    def _bring(self, indices):
        self.gate.wait(20)
        self.threads.add(threading.current_thread())
        self.gathered.append(indices.tolist())
        return super()._bring(indices)


def test_prefetch_returns_at_once_and_works_in_another_thread():
    host = Watched(numbered(10))
    host.prefetch(torch.tensor([1, 2]))
    assert host.gathered == []  # the gate is shut, and we are here
    host.gate.set()
    images, rows, _ = host.gather(torch.tensor([1, 2]))
    assert torch.equal(images[rows], numbered(10)[1:3])
    assert host.gathered == [[1, 2]]  # once
    assert threading.current_thread() not in host.threads


def test_batches_come_in_the_order_of_their_prefetches():
    host = Watched(numbered(10))
    host.gate.set()
    batches = [torch.tensor([i, i + 1]) for i in range(8)]
    for batch in batches[:2]:
        host.prefetch(batch)
    for number, batch in enumerate(batches):
        images, rows, indices = host.gather(batch)
        assert torch.equal(images[rows], numbered(10)[batch])
        assert torch.equal(indices, batch)
        if number + 2 < len(batches):
            host.prefetch(batches[number + 2])
    assert host.gathered == [batch.tolist() for batch in batches]


def test_a_batch_that_was_not_prefetched_drops_those_that_were():
    host = Watched(numbered(10))
    host.gate.set()
    host.prefetch(torch.tensor([1]))
    host.prefetch(torch.tensor([2]))
    for wanted in ([2], [7, 8], [1]):
        images, rows, _ = host.gather(torch.tensor(wanted))
        assert torch.equal(images[rows], numbered(10)[wanted])
    assert host.gathered == [[1], [2], [7, 8], [1]]


def test_an_error_of_the_thread_reaches_the_caller():
    host = HostImages(numbered(10), CPU)
    host.prefetch(torch.tensor([10]))
    with pytest.raises(IndexError):
        host.gather(torch.tensor([10]))
    assert host.gather(torch.tensor([9]))[2].tolist() == [9]


def test_the_budget_decides_where_images_lie():
    images = torch.zeros(2**10, 1, 32, 32, dtype=torch.uint8)  # 1 MiB
    assert isinstance(place_images(images, CPU, 2**-10), DeviceImages)
    assert isinstance(place_images(images, CPU, 2**-10 - 2**-30), HostImages)
    assert isinstance(place_images(images, CPU, 0), HostImages)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_batches_are_right_while_the_device_is_busy():
    images = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8)
    host = HostImages(images, torch.device("cuda"))
    batches = list(torch.randperm(5000).split(500))
    sums = []
    for number, batch in enumerate(batches):
        pixels, rows, indices = host.gather(batch)
        if number + 1 < len(batches):
            host.prefetch(batches[number + 1])
        torch.cuda._sleep(10**8)  # the step: its batch must stay until it is done
        sums.append(torch.stack([pixels[rows].sum(), indices.sum()]))
    for batch, found in zip(batches, sums, strict=True):
        assert found.tolist() == [int(images[batch].long().sum()), int(batch.sum())]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_without_a_host_sync():
    host = HostImages(numbered(300), torch.device("cuda"))
    wanted = torch.randperm(300)[:64]
    host.gather(wanted)  # the first pinned buffer is made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        host.prefetch(wanted)
        images, rows, _ = host.gather(wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(images[rows].cpu(), numbered(300)[wanted])
