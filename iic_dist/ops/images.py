"""Image operations on a batch, with parameters of their own for each image.

Every operation does to each image what torchvision.transforms.v2.functional does to one. Images are floating
point (B, C, H, W) in [0, 1] with C = 1 or 3, parameters are tensors over B on the same device, and nothing
waits for the device. The crop is two matrix products: with torch's TF32 switched on, they round weights to 11 bits on
CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in gray: ITU-R BT.601, as rounded by torchvision."""

SOBEL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
"""The kernel of the horizontal gradient, which conv2d slides without turning; its transpose is the vertical one."""

_FAR = 1e6  # pixels; beyond the support of every filter
_SHARPEST = 1e-3  # pixels; a Gaussian so narrow is exactly one pixel in float32 and float64
_NO_SPREAD = 1e-12  # below the steps of float32 in [0, 1] but for black; keeps 0 / 0 out


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) in the dtype of the images."""
    return values.to(images.dtype).view(-1, 1, 1, 1)


def _triangle_weights(
    start: Tensor, length: Tensor, pixels: int, size: int, flip: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Weights that resample [start, start + length) of a line of pixels to `size` samples.

    Args:
        start, length: (B,) in pixels.
        flip: (B,) bool, reverse the samples.

    Returns:
        (B, size, pixels), rows sum to 1: a triangle one pixel wide at each side, or one sample where that is
        more (antialias), over the pixels whose centre lies in the section.
    """
    start, length = start.double().unsqueeze(1), length.double().unsqueeze(1)
    sample = torch.arange(size, dtype=torch.float64, device=start.device) + 0.5
    pixel = torch.arange(pixels, dtype=torch.float64, device=start.device) + 0.5
    if flip is not None:
        sample = torch.where(flip.unsqueeze(1), size - sample, sample)
    step = length / size
    support = step.clamp(min=1.0)
    middle = start + length / 2  # coordinates around it are small, which keeps float32 exact enough
    outside = (pixel < start) | (pixel > start + length)
    tap = ((pixel - middle) / support).masked_fill(outside, _FAR).to(dtype)
    centre = ((sample * step - length / 2) / support).to(dtype)
    weights = (tap.unsqueeze(1) - centre.unsqueeze(2)).abs_().neg_().add_(1.0).clamp_(min=0.0)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def resized_crop(images: Tensor, box: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Cut a box out of each image and resize it, bilinear with antialias.

    Equals `resized_crop(image, top, left, height, width, [size, size], antialias=True)` for whole boxes,
    followed by `horizontal_flip` where `flip` says so. Two matrix products: rows @ image @ columns^T.

    Args:
        box: (B, 4) top, left, height, width in pixels, fractions allowed; inside the image, sides at least 1.
        size: side of the result in pixels.
        flip: (B,) bool.

    Returns:
        (B, C, size, size).
    """
    top, left, height, width = box.unbind(1)
    rows = _triangle_weights(top, height, images.shape[2], size, None, images.dtype)
    columns = _triangle_weights(left, width, images.shape[3], size, flip, images.dtype)
    batch, channels, pixels, _ = images.shape
    across = torch.bmm(images.reshape(batch, channels * pixels, -1), columns.transpose(1, 2))
    across = across.view(batch, channels, pixels, size)
    # One product for all channels would copy `rows` for each. Contiguous planes, because the library's
    # batched product takes no others; they would be multiplied image by image.
    resized = images.new_empty(channels, batch, size, size)
    for channel in range(channels):
        torch.bmm(rows, across[:, channel], out=resized[channel])
    return resized.transpose(0, 1)


def affine(images: Tensor, inverse: Tensor) -> Tensor:
    """Rotate, scale, shear and move each image about its centre, bilinear, zeros outside.

    Equals `affine(image, angle, translate, scale, shear, InterpolationMode.BILINEAR)` with
    `inverse = view_spec.inverse_affine(...)` of these.

    Args:
        inverse: (B, 6) (a, b, c, d, e, f): the result at (x, y) is the image at (a x + b y + c, d x + e y + f), in
            pixels from the centre.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, dtype=torch.float64, device=images.device) - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float64, device=images.device) - (height - 1) / 2
    grid = images.new_empty(images.shape[0], height, width, 2)
    for axis, side in enumerate((width, height)):
        from_x, from_y, shift = inverse[:, 3 * axis : 3 * axis + 3].double().mul(2 / side).split(1, dim=1)
        along_x, along_y = (from_x * x).to(images.dtype), (from_y * y + shift).to(images.dtype)
        torch.add(along_x.unsqueeze(1), along_y.unsqueeze(2), out=grid[..., axis])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def rgb_to_grayscale(images: Tensor) -> Tensor:
    """Luma of each image, (B, 1, H, W); a gray image is returned as it is."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """share * images + (1 - share) * other, clamped; `share` may lie outside [0, 1]."""
    share = _per_image(share, images)
    return images.mul(share).add_(other * (1.0 - share)).clamp_(0.0, 1.0)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its factor (B,) >= 0 and clamp; 1 changes nothing."""
    return images.mul(_per_image(factor, images)).clamp_(0.0, 1.0)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its own mean gray by its factor (B,) >= 0; 1 changes nothing."""
    return _blend(images, rgb_to_grayscale(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each RGB image with its gray by its factor (B,) >= 0; 1 changes nothing, 0 makes it gray."""
    return _blend(images, rgb_to_grayscale(images), factor)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue (HSV) of each RGB image by its factor (B,) in [-0.5, 0.5] of the circle.

    The turn keeps value and saturation, that is the largest and smallest channel of a pixel, so each new
    channel is smallest + (largest - smallest) * a trapezoid of the new hue.
    """
    red, green, blue = images.unbind(1)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    spread = torch.maximum(torch.maximum(red, green), blue).sub_(smallest)
    # Sixths of the circle from red: |hue| = 1 + (green + blue - red - smallest) / spread, on the side of the
    # larger of green and blue. The textbook's three cases take five times as long on a CPU.
    hue = (green + blue).sub_(red).sub_(smallest).div_(spread.clamp(min=_NO_SPREAD)).add_(1.0)
    hue.copysign_(green - blue).add_(factor.to(images.dtype).view(-1, 1, 1) * 6.0)
    hue.sub_(hue.mul(1 / 6).floor_(), alpha=6.0)
    shares = (
        (hue - 3.0).abs_().sub_(1.0),
        (hue - 2.0).abs_().neg_().add_(2.0),
        (hue - 4.0).abs_().neg_().add_(2.0),
    )
    turned = torch.empty_like(images)
    for channel, share in enumerate(shares):
        torch.addcmul(smallest, spread, share.clamp_(0.0, 1.0), out=turned[:, channel])
    return turned


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur each image with its own Gaussian, reflecting at the border.

    Equals `gaussian_blur(image, kernel_size, sigma)`.

    Args:
        sigma: (B,) in pixels; 0 leaves the image as it is.
        kernel_size: odd, at most twice the shorter side minus one.
    """
    reach = kernel_size // 2
    offset = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    narrow = sigma.to(images.dtype).clamp(min=_SHARPEST).unsqueeze(1)
    kernel = torch.softmax((offset / narrow).square().mul_(-0.5), dim=1)
    weights = kernel.view(-1, kernel_size, 1, 1, 1).unbind(1)
    blurred = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    for dim in (2, 3):
        taps = [blurred.narrow(dim, start, images.shape[dim]) for start in range(kernel_size)]
        blurred = taps[reach] * weights[reach]
        for left in range(reach):  # the kernel is symmetric
            blurred.addcmul_(taps[left] + taps[-1 - left], weights[left])
    return blurred


def sobel(images: Tensor) -> Tensor:
    """Horizontal and vertical Sobel gradient of the gray image, zeros outside: (B, 2, H, W).

    Equals conv2d with `SOBEL` and its transpose, padding 1, as in IIC's
    `sobel_process`.
    """
    gray = F.pad(rgb_to_grayscale(images), (1, 1, 1, 1)).squeeze(1)
    left_right = gray[:, :, :-2] - gray[:, :, 2:]
    up_down = gray[:, :-2] - gray[:, 2:]
    gradients = images.new_empty(images.shape[0], 2, *images.shape[2:])
    torch.add(left_right[:, :-2] + left_right[:, 2:], left_right[:, 1:-1], alpha=2.0, out=gradients[:, 0])
    torch.add(up_down[:, :, :-2] + up_down[:, :, 2:], up_down[:, :, 1:-1], alpha=2.0, out=gradients[:, 1])
    return gradients


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image - mean) / std, with one number for each channel or one for all."""
    if len(mean) == len(std) == 1:
        return (images - mean[0]).div_(std[0])
    channels = zip(images.split(1, dim=1), mean, std, strict=True)
    return torch.cat([(channel - m).div_(s) for channel, m, s in channels], dim=1)
