"""The pictures of a run: pairs of views, the confusion matrix, each cluster's most confident images.

matplotlib is imported where it is used, by the one process that draws: it takes most of a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from iic_dist.evaluation.metrics import accuracy, match_clusters

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from iic_dist.evaluation.health import Recommendation

_BACKGROUND = (236, 236, 236)  # not the white of a Sobel map's zero
_INK = (40, 40, 40)
_FAINT_INK = (130, 130, 130)
_POSITIVE = (178, 24, 43)  # red, through white at zero, to blue
_NEGATIVE = (33, 102, 172)
_GAP = 2  # pixels between tiles
_BLOCK_GAP = 18  # pixels between blocks of rows
_MARGIN = 6
_MAX_COUNT_TEXTS = 20  # up to so many classes a count in a cell can be read
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


def confusion(counts: Tensor | np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw counts as a matrix: a row per cluster in Hungarian order, a column per class.

    Colours are shares of the row, that is of the cluster. Clusters without a class of their own (K > C) or
    without images come last, in the order of their most frequent class.

    Args:
        counts: (K, C) int64 of one sub-head.
        class_names: C names.
    """
    from matplotlib.figure import Figure

    table = counts.cpu().numpy() if isinstance(counts, Tensor) else counts
    matched = match_clusters(table)
    order = np.lexsort((table.argmax(axis=1), matched, (matched < 0) | (table.sum(axis=1) == 0)))
    table, num_clusters, num_classes = table[order], *table.shape
    sizes = table.sum(axis=1)
    shares = table / np.maximum(sizes, 1)[:, None]
    figure = Figure(figsize=(2.6 + 1.4 * _length(num_classes), 1.7 + _length(num_clusters)), dpi=100)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of the cluster", fraction=0.05, pad=0.02)
    _name_ticks(axes.xaxis, class_names)
    if max(len(name) for name in class_names) > 3:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    _name_ticks(axes.yaxis, [f"{k} ({n:,})" for k, n in zip(order, sizes, strict=True)])
    axes.set(xlabel="class", ylabel="cluster (images)")
    axes.set_title(f"accuracy {accuracy(table):.3f} on {sizes.sum():,} images", fontsize=11)
    if num_classes <= _MAX_COUNT_TEXTS:
        for row, column in np.argwhere(table):
            colour = "white" if shares[row, column] > 0.55 else "#303030"
            axes.text(column, row, table[row, column], ha="center", va="center", color=colour, fontsize=8)
    return figure


def choices(recommendation: Recommendation) -> Figure:
    """Draw over K how well the sub-heads agree, how much they say, and how large the clusters are.

    Args:
        recommendation: Of at least two K; the recommended one is marked.
    """
    from matplotlib.figure import Figure

    healths, chosen = recommendation.choices, recommendation.chosen
    ks = [each.num_clusters for each in healths]
    places = range(len(ks))
    figure = Figure(figsize=(11, 3.6), dpi=100)
    figure.set_layout_engine("constrained")
    stability, information, sizes = figure.subplots(1, 3)
    means, errors = zip(*(each.measured for each in healths), strict=True)
    stability.errorbar(places, means, errors, fmt="o-", capsize=4, color="#2166ac")
    stability.set(title="agreement of the sub-heads", ylabel="mean ARI ± standard error")
    information.plot(places, [each.information_share for each in healths], "o-", color="#2166ac")
    information.set(title="information", ylabel="mutual information / ln K")
    sizes.boxplot([each.sizes for each in healths], positions=places, widths=0.5, whis=(0, 100))
    for place, each in enumerate(healths):
        sizes.annotate(
            f"{each.used_clusters} used",
            (place, each.sizes[0]),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    sizes.margins(y=0.12)
    sizes.set(title="cluster sizes", ylabel="images: least, quartiles, most", ylim=(0, None))
    for axes in (stability, information, sizes):
        axes.set_xticks(places, [str(k) for k in ks])
        axes.set(xlabel="K", xlim=(-0.6, len(ks) - 0.4))
        axes.axvspan(healths.index(chosen) - 0.4, healths.index(chosen) + 0.4, color="#fddbc7", zorder=0)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(f"K = {chosen.num_clusters} is recommended", fontsize=11)
    return figure


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


def render(figure: Figure) -> np.ndarray:
    """Return a figure as pixels, (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _length(cells: int) -> float:
    """Return the inches that so many rows or columns of the confusion matrix get."""
    return 0.36 * cells if cells <= 20 else min(max(7.2, 0.17 * cells), 17.0)


def _name_ticks(axis: Axis, names: Sequence[str]) -> None:
    step = math.ceil(len(names) / 100)  # beyond 100 the names would overlap
    axis.set_ticks(range(0, len(names), step), names[::step], fontsize=9 if len(names) <= 20 else 7)


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
