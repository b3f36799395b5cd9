"""Each batched image operation against torchvision, image by image, or against a plain loop."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TV
from torch import Tensor

from iic_dist.ops import images as ops
from iic_dist.views.draw import inverse_affine

BATCH = 12
SIZES = [(8, 8), (28, 24), (32, 32), (96, 64)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SHAPES = [(channels, size) for channels in (1, 3) for size in (8, 28, 32, 96)]

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
all_shapes = pytest.mark.parametrize(("channels", "size"), SHAPES)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def between(least: float, largest: float, *shape: int) -> Tensor:
    return least + torch.rand(shape or (BATCH,)) * (largest - least)


def one_by_one(images: Tensor, operation: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply `operation(image, row)` to each image in float64, the truth for both types."""
    return torch.stack([operation(image.double(), row) for row, image in enumerate(images)])


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float = 0.0) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance or TOLERANCE[dtype])


@both_dtypes
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "size"), [*SIZES, (96, 20), (20, 64)])
def test_resized_crop_equals_torchvision(side: int, size: int, channels: int, dtype: torch.dtype) -> None:
    images = torch.rand(BATCH, channels, side, side + 3, dtype=dtype)
    height, width = torch.randint(1, side + 1, (BATCH,)), torch.randint(1, side + 4, (BATCH,))
    height[0], width[0] = side, side + 3
    height[1] = width[1] = 1
    top = (torch.rand(BATCH) * (side - height + 1)).long()
    left = (torch.rand(BATCH) * (side + 3 - width + 1)).long()
    box = torch.stack((top, left, height, width), dim=1)
    flip = torch.rand(BATCH) < 0.5

    def crop(image: Tensor, row: int) -> Tensor:
        cut = TV.resized_crop(image, *box[row].tolist(), [size, size], antialias=True)
        return TV.horizontal_flip(cut) if flip[row] else cut

    assert_close(ops.resized_crop(images, box.float(), size, flip), one_by_one(images, crop), dtype)


def resample_by_hand(line: list[float], start: float, length: float, size: int) -> list[float]:
    """One line, one output sample at a time, from the definition of the antialiased triangle filter."""
    samples = []
    for i in range(size):
        middle = start + (i + 0.5) * length / size
        reach = max(1.0, length / size)
        weighted = total = 0.0
        for j, value in enumerate(line):
            if start <= j + 0.5 <= start + length:
                weight = max(0.0, 1.0 - abs(j + 0.5 - middle) / reach)
                weighted, total = weighted + weight * value, total + weight
        samples.append(weighted / total)
    return samples


@both_dtypes
@pytest.mark.parametrize(("side", "size"), [(9, 7), (12, 20)])
def test_resized_crop_of_fractional_boxes(side: int, size: int, dtype: torch.dtype) -> None:
    images = torch.rand(6, 1, side, side, dtype=dtype)
    lengths = between(1.0, side, 6, 2)
    starts = torch.rand(6, 2) * (side - lengths)
    box = torch.cat((starts, lengths), dim=1)

    def crop(image: Tensor, row: int) -> Tensor:
        top, left, height, width = box[row].double().tolist()
        lines = [resample_by_hand(line, left, width, size) for line in image[0].tolist()]
        columns = [resample_by_hand(list(column), top, height, size) for column in zip(*lines, strict=True)]
        return torch.tensor(columns, dtype=torch.float64).T.unsqueeze(0)

    assert_close(ops.resized_crop(images, box, size), one_by_one(images, crop), dtype)


@both_dtypes
@all_shapes
def test_affine_equals_torchvision(channels: int, size: int, dtype: torch.dtype) -> None:
    images = torch.rand(BATCH, channels, size, size + 4, dtype=dtype)
    angle, shift = between(-180, 180), between(-size / 4, size / 4, BATCH, 2)
    scale, shear = between(0.5, 1.5), between(-40, 40, BATCH, 2)

    def move(image: Tensor, row: int) -> Tensor:
        parts = angle[row].item(), shift[row].tolist(), scale[row].item(), shear[row].tolist()
        return TV.affine(image, *parts, interpolation=TV.InterpolationMode.BILINEAR)

    # In float32 a coordinate of 100 pixels is off by 4e-6 pixels, times a step of up to 1 along x and y.
    tolerance = 4e-5 if dtype == torch.float32 and size == 96 else 0.0
    motion = (angle, *shear.unbind(1), *shift.unbind(1), scale)
    moved = ops.affine(images, inverse_affine(*(part.double() for part in motion)))
    assert_close(moved, one_by_one(images, move), dtype, tolerance)


@both_dtypes
@all_shapes
@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation"])
def test_blends_equal_torchvision(name: str, channels: int, size: int, dtype: torch.dtype) -> None:
    images = torch.rand(BATCH, channels, size, size, dtype=dtype)
    factor = between(0.0, 2.0)
    factor[:2] = torch.tensor([0.0, 1.0])
    expected = one_by_one(images, lambda image, row: getattr(TV, name)(image, factor[row].item()))
    actual = getattr(ops, name)(images, factor)
    assert_close(actual, expected, dtype)
    assert torch.equal(actual[1], images[1])  # factor 1


def colours(size: int, dtype: torch.dtype) -> Tensor:
    """Random RGB images, the last two made of black, gray, white, pure and two-channel colours."""
    images = torch.rand(BATCH, 3, size, size, dtype=dtype)
    images[-2:] = torch.randint(0, 3, (2, 3, size, size)).to(dtype) / 2
    return images


@both_dtypes
@pytest.mark.parametrize("size", [8, 28, 32, 96])
def test_hue_equals_torchvision(size: int, dtype: torch.dtype) -> None:
    images = colours(size, dtype)
    factor = between(-0.5, 0.5)
    factor[:3] = torch.tensor([-0.5, 0.0, 0.5])
    factor[-2:] = torch.tensor([1 / 3, -1 / 6])
    expected = one_by_one(images, lambda image, row: TV.adjust_hue(image, factor[row].item()))
    assert_close(ops.adjust_hue(images, factor), expected, dtype, 1e-5)  # torchvision computes in float32


def test_hue_equals_colorsys_in_float64() -> None:
    images = colours(4, torch.float64)
    factor = between(-0.5, 0.5).double()

    def turn(image: Tensor, row: int) -> Tensor:
        turned = []
        for pixel in image.flatten(1).T.tolist():
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            turned.append(colorsys.hsv_to_rgb((hue + factor[row].item()) % 1.0, saturation, value))
        return torch.tensor(turned, dtype=torch.float64).T.reshape(image.shape)

    assert_close(ops.adjust_hue(images, factor), one_by_one(images, turn), torch.float64)


@both_dtypes
@all_shapes
def test_grayscale_equals_torchvision(channels: int, size: int, dtype: torch.dtype) -> None:
    images = torch.rand(BATCH, channels, size, size, dtype=dtype)
    gray = ops.rgb_to_grayscale(images)
    assert_close(gray, one_by_one(images, lambda image, row: TV.rgb_to_grayscale(image)), dtype)
    if channels == 3:
        none, full = torch.zeros(BATCH), torch.ones(BATCH)
        assert torch.equal(ops.adjust_saturation(images, none), gray.expand_as(images))
        assert torch.equal(ops.adjust_saturation(images, full), images)


@both_dtypes
@all_shapes
@pytest.mark.parametrize("kernel_size", [3, 9])
def test_blur_equals_torchvision(kernel_size: int, channels: int, size: int, dtype: torch.dtype) -> None:
    images = torch.rand(BATCH, channels, size, size + 1, dtype=dtype)
    sigma = between(0.1, 2.0)
    sigma[0] = 0.0

    def blur(image: Tensor, row: int) -> Tensor:
        return TV.gaussian_blur(image, [kernel_size] * 2, [sigma[row].item()] * 2) if row else image

    blurred = ops.gaussian_blur(images, sigma, kernel_size)
    assert_close(blurred, one_by_one(images, blur), dtype)
    assert torch.equal(blurred[0], images[0])


@both_dtypes
@all_shapes
def test_sobel_equals_convolution(channels: int, size: int, dtype: torch.dtype) -> None:
    images = torch.rand(BATCH, channels, size, size + 1, dtype=dtype)
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=torch.float64)
    filters = torch.stack((across, across.T)).unsqueeze(1)
    gray = one_by_one(images, lambda image, row: TV.rgb_to_grayscale(image))
    assert_close(ops.sobel(images), F.conv2d(gray, filters, padding=1), dtype)


@both_dtypes
@all_shapes
def test_normalize_equals_torchvision(channels: int, size: int, dtype: torch.dtype) -> None:
    images = torch.rand(BATCH, channels, size, size, dtype=dtype)
    for count in {1, channels}:
        mean, std = [0.49, 0.48, 0.45][:count], [0.25, 0.24, 0.26][:count]
        expected = one_by_one(images, lambda image, row, m=mean, s=std: TV.normalize(image, m, s))
        assert_close(ops.normalize(images, mean, std), expected, dtype)


def test_operations_leave_their_input_alone() -> None:
    images = colours(8, torch.float32)
    before = images.clone()
    ones = torch.full((BATCH,), 0.3)
    ops.resized_crop(images, torch.tensor([[0.0, 0, 8, 8]]).expand(BATCH, 4), 8)
    ops.affine(images, torch.full((BATCH, 6), 0.3))
    for name in ("brightness", "contrast", "saturation", "hue"):
        getattr(ops, f"adjust_{name}")(images, ones)
    ops.gaussian_blur(images, ones, 3)
    ops.sobel(images)
    ops.normalize(images, (0.5,), (0.5,))
    assert torch.equal(images, before)
