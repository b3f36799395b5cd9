"""The pictures of a run: pairs of views, the confusion matrix, each cluster's most confident images.

matplotlib is imported where it is used, by the one process that draws: it takes most of a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from iic_dist.evaluation.metrics import accuracy, match_clusters

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from iic_dist.evaluation.health import Recommendation

_MAX_COUNT_TEXTS = 20  # up to so many classes a count in a cell can be read


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
        if recommendation.found:
            axes.axvspan(healths.index(chosen) - 0.4, healths.index(chosen) + 0.4, color="#fddbc7", zorder=0)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(recommendation.title(), fontsize=11)
    return figure


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
