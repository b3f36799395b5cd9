"""Images on the device: a batch is the images at its indices, and nothing waits for it."""

from __future__ import annotations

import pytest
import torch

from iic_dist.data.device import DeviceImages


def numbered(count: int) -> torch.Tensor:
    """Images whose every byte is different, as far as a byte goes."""
    return torch.arange(count * 3 * 4 * 5).remainder(251).to(torch.uint8).reshape(count, 3, 4, 5)


def test_gather_picks_the_images_at_the_indices():
    images = numbered(11)
    resident = DeviceImages(images, torch.device("cpu"))
    assert len(resident) == 11
    picked, rows, indices = resident.gather(torch.tensor([10, 0, 3, 3]))
    assert picked.dtype == torch.uint8
    assert indices.tolist() == [10, 0, 3, 3]
    assert torch.equal(picked[rows], images[[10, 0, 3, 3]])


def test_a_batch_is_not_copied():
    resident = DeviceImages(numbered(4), torch.device("cpu"))
    picked, _, _ = resident.gather(torch.tensor([1, 2]))
    assert picked.data_ptr() == resident.images.data_ptr()


def test_images_in_any_memory_layout():
    images = numbered(6).contiguous(memory_format=torch.channels_last)
    resident = DeviceImages(images, torch.device("cpu"))
    picked, rows, _ = resident.gather(torch.tensor([5, 2]))
    assert torch.equal(picked[rows], numbered(6)[[5, 2]])
    assert picked.is_contiguous()
    assert resident.images.is_contiguous()  # row by row in memory, so that one image is one read


def test_only_uint8_images_of_four_dimensions():
    with pytest.raises(AssertionError, match="uint8"):
        DeviceImages(numbered(2).float(), torch.device("cpu"))
    with pytest.raises(AssertionError, match=r"\(M, C, H, W\)"):
        DeviceImages(numbered(2)[0], torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_without_a_host_sync():
    images = numbered(300)
    resident = DeviceImages(images, torch.device("cuda"))
    wanted = torch.randperm(300)[:64]
    torch.cuda.set_sync_debug_mode("error")
    try:
        picked, rows, indices = resident.gather(wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert picked.is_cuda
    assert indices.is_cuda
    assert torch.equal(picked[rows].cpu(), images[wanted])
    assert torch.equal(indices.cpu(), wanted)
