"""Pictures made of pictures: pairs of views, each cluster's most confident images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    pass


_BACKGROUND = (236, 236, 236)  # not the white of a Sobel map's zero


_INK = (40, 40, 40)


_FAINT_INK = (130, 130, 130)


_POSITIVE = (178, 24, 43)  # red, through white at zero, to blue


_NEGATIVE = (33, 102, 172)


_GAP = 2  # pixels between tiles


_BLOCK_GAP = 18  # pixels between blocks of rows


_MARGIN = 6


_MAX_ROWS = 20  # of one block of the mosaic


def view_pairs(
    first: Tensor,
    second: Tensor,
    originals: Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_images: int = 16,
) -> np.ndarray:
    """Draw images and their views side by side, one image a row, in two blocks of rows.

    Views of two channels are Sobel maps, shown as a pair (horizontal, vertical), red where positive and blue
    where negative. Others are denormalised by `mean` and `std`, or else stretched to their own range.

    Args:
        first: (N, C, S, S) float, first views.
        second: (R * N, C, S, S) float, second views, repeat-major.
        originals: (N, C', H, W) uint8, drawn in the first column; None leaves the column out.
        mean: of each channel, as subtracted in the views; needs `std`.
        std: of each channel, as divided by.
        num_images: how many of the N to draw at most.

    Returns:
        (height, width, 3) uint8.

    Sync: copies the drawn images to the host.
    """
    count = min(num_images, len(first))
    columns: list[tuple[str, list[np.ndarray]]] = []
    if originals is not None:
        columns.append(("original", [_picture(image / 255) for image in originals[:count].cpu()]))
    for number, start in enumerate([0, *range(0, len(second), len(first))]):
        views = (first if number == 0 else second)[start : start + count].float().cpu()
        columns.append((f"view {number + 1}", [_view_picture(view, mean, std) for view in views]))
    return _side_by_side([_captioned(columns, slice(k, None, 2)) for k in range(min(2, count))])


def cluster_mosaic(
    images: Tensor,
    clusters: Tensor,
    confidence: Tensor,
    num_clusters: int,
    per_cluster: int = 12,
    doubtful: bool = False,
) -> np.ndarray:
    """Draw each cluster's most confident images, the surest first, one cluster a row.

    At the left of a row stand the cluster and the number of its images.

    Args:
        images: (M, C, H, W) uint8.
        clusters: (M,) int64 in [0, num_clusters), by one sub-head.
        confidence: (M,) float, how sure it is of each.
        num_clusters: K.
        per_cluster: how many images to draw a cluster at most.
        doubtful: draw the least confident instead, the most doubtful first.

    Returns:
        (height, width, 3) uint8.

    Sync: copies clusters, confidence and the drawn images to the host.
    """
    sign = 1 if doubtful else -1
    by_cluster = np.lexsort((sign * confidence.cpu().numpy(), clusters.cpu().numpy()))
    sizes = np.bincount(clusters.cpu().numpy(), minlength=num_clusters)
    starts = np.cumsum(sizes) - sizes
    height, width = _drawn_size(*images.shape[-2:])
    rows = []
    for k, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        best = torch.from_numpy(by_cluster[start : start + min(size, per_cluster)])
        chosen = images[best.to(images.device)].cpu()
        tiles = [_picture(image / 255) for image in chosen]
        tiles += [_blank(height, width)] * (per_cluster - len(tiles))
        rows.append(_beside(_row_label(f"{k}", f"{size:,}", height), *tiles))
    per_block = math.ceil(num_clusters / math.ceil(num_clusters / _MAX_ROWS))
    return _side_by_side([_below(*rows[k : k + per_block]) for k in range(0, num_clusters, per_block)])


def _view_picture(view: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
    if view.shape[0] == 2:
        strength = (view / view.abs().amax().clamp(min=1e-12)).unsqueeze(1)
        colour = torch.where(strength > 0, _colour(_POSITIVE), _colour(_NEGATIVE))
        return _beside(*(_picture(signed) for signed in 1 - strength.abs() * (1 - colour)))
    if mean is not None and std is not None:
        view = view * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    else:
        low, high = view.amin(), view.amax()
        view = (view - low) / (high - low).clamp(min=1e-12)
    return _picture(view)


def _colour(rgb: tuple[int, int, int]) -> Tensor:
    return torch.tensor(rgb).view(3, 1, 1) / 255


def _drawn_size(height: int, width: int) -> tuple[int, int]:
    """Return the size at which an image is drawn: a whole multiple that reaches 48 px, at most 96 px."""
    longest = max(height, width)
    scale = math.ceil(48 / longest) if longest < 48 else min(1.0, 96 / longest)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _picture(image: Tensor) -> np.ndarray:
    """Turn (1 or 3, H, W) in [0, 1] into (h, w, 3) uint8 of a size that the eye can use."""
    size = _drawn_size(*image.shape[-2:])
    mode = "nearest-exact" if size[0] >= image.shape[-2] else "area"
    scaled = F.interpolate(image[None].float(), size, mode=mode)[0].clamp(0, 1)
    return (scaled * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).numpy()


def _captioned(columns: list[tuple[str, list[np.ndarray]]], rows: slice) -> np.ndarray:
    """Draw columns of tiles, each tile in the middle of its cell, under their captions."""
    height = max(tile.shape[0] for _, tiles in columns for tile in tiles)
    drawn = []
    for caption, tiles in columns:
        width = max(52, *(tile.shape[1] for tile in tiles))
        head = Image.new("RGB", (width, 16), _BACKGROUND)
        ImageDraw.Draw(head).text((width / 2, 8), caption, fill=_INK, font=_font(11), anchor="mm")
        drawn.append(_below(np.asarray(head), *(_centred(tile, height, width) for tile in tiles[rows])))
    return _beside(*drawn)


def _row_label(name: str, note: str, height: int) -> np.ndarray:
    label = Image.new("RGB", (52, height), _BACKGROUND)
    draw = ImageDraw.Draw(label)
    draw.text((46, height / 2 - 1), name, fill=_INK, font=_font(14), anchor="rb")
    draw.text((46, height / 2 + 2), note, fill=_FAINT_INK, font=_font(10), anchor="rt")
    return np.asarray(label)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), _BACKGROUND, np.uint8)


def _centred(tile: np.ndarray, height: int, width: int) -> np.ndarray:
    cell = _blank(height, width)
    top, left = (height - tile.shape[0]) // 2, (width - tile.shape[1]) // 2
    cell[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return cell


def _beside(*tiles: np.ndarray, gap: int = _GAP) -> np.ndarray:
    """Join tiles from left to right, top-aligned, on the background."""
    width = sum(tile.shape[1] for tile in tiles) + gap * (len(tiles) - 1)
    canvas = _blank(max(tile.shape[0] for tile in tiles), width)
    left = 0
    for tile in tiles:
        canvas[: tile.shape[0], left : left + tile.shape[1]] = tile
        left += tile.shape[1] + gap
    return canvas


def _below(*tiles: np.ndarray) -> np.ndarray:
    """Join tiles from top to bottom, left-aligned, on the background."""
    return _beside(*(tile.swapaxes(0, 1) for tile in tiles)).swapaxes(0, 1)


def _side_by_side(blocks: list[np.ndarray]) -> np.ndarray:
    """Join blocks and put a margin around all."""
    joined = _beside(*blocks, gap=_BLOCK_GAP)
    return _centred(joined, joined.shape[0] + 2 * _MARGIN, joined.shape[1] + 2 * _MARGIN)
