"""How well clusters agree with classes: counts, the one-to-one match, accuracy, NMI, ARI.

Everything follows from the K x C matrix of counts, which ranks add up.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def count_matrix(predictions: Tensor, labels: Tensor, num_clusters: int, num_classes: int) -> Tensor:
    """Count how many images of each class are in each cluster, for every sub-head.

    Args:
        predictions: (M, H) int64, the cluster of each image in [0, K).
        labels: (M,) int64, its class in [0, C); -1 for an image that does not count.
        num_clusters: K.
        num_classes: C.

    Returns:
        (H, K, C) int64 on the device of `predictions`. The sum over shards is the matrix of the whole.

    Sync: none.
    """
    num_sub_heads = predictions.shape[1]
    row = torch.arange(num_sub_heads, device=predictions.device) * num_clusters + predictions
    cell = row * num_classes + labels.clamp(min=0)[:, None]
    counted = (labels >= 0).to(torch.int64)[:, None].expand_as(cell)
    counts = torch.zeros(num_sub_heads * num_clusters * num_classes, dtype=torch.int64, device=predictions.device)
    counts.scatter_add_(0, cell.flatten(), counted.flatten())
    return counts.view(num_sub_heads, num_clusters, num_classes)


def match_clusters(counts: Tensor | np.ndarray) -> np.ndarray:
    """Match clusters and classes one to one so that most images lie in their cluster's class (Hungarian).

    Args:
        counts: (K, C).

    Returns:
        (K,) int64: the class of each cluster, -1 for the K - C clusters that are left over where K > C.
    """
    table = _table(counts)
    clusters, classes = linear_sum_assignment(table, maximize=True)
    matched = np.full(table.shape[0], -1, dtype=np.int64)
    matched[clusters] = classes
    return matched


def agreeing_share(clusters: Tensor, selected: int, num_clusters: int) -> Tensor:
    """Return which share of the other sub-heads puts each image where the selected one does.

    Sub-heads number their clusters as they like, so each one's are first matched one to one with the selected one's,
    over these images (Hungarian). That takes images enough: a single one always agrees.

    Args:
        clusters: (M, H) int64 in [0, K), by each sub-head.
        selected: The sub-head to agree with, in [0, H).
        num_clusters: K.

    Returns:
        (M,) float32 in [0, 1]; NaN where H = 1, because nothing is known of others.
    """
    num_sub_heads = clusters.shape[1]
    if num_sub_heads == 1:
        return torch.full((len(clusters),), math.nan)
    counts = count_matrix(clusters, clusters[:, selected], num_clusters, num_clusters)
    matched = torch.stack([torch.from_numpy(match_clusters(table)) for table in counts])  # (H, K)
    renamed = matched.to(clusters.device).gather(1, clusters.T).T  # (M, H)
    agreeing = (renamed == clusters[:, selected, None]).sum(1) - 1  # without the selected one itself
    return agreeing.float() / (num_sub_heads - 1)


def accuracy(counts: Tensor | np.ndarray) -> float:
    """Return the share of images in [0, 1] that lie in their cluster's matched class; NaN for no image."""
    table = _table(counts)
    matched = match_clusters(table)
    clusters = np.flatnonzero(matched >= 0)
    total = int(table.sum())
    return float(table[clusters, matched[clusters]].sum() / total) if total else math.nan


def nmi(counts: Tensor | np.ndarray) -> float:
    """Return the mutual information over the mean entropy of both, in [0, 1]; NaN for no image."""
    # Imported here: it takes a second, and only an evaluation needs it.
    from sklearn.metrics import normalized_mutual_info_score

    clusters, classes = _assignments(counts)
    return float(normalized_mutual_info_score(classes, clusters)) if len(classes) else math.nan


def ari(counts: Tensor | np.ndarray) -> float:
    """Return the Rand index adjusted for chance, in [-0.5, 1]; NaN for no image."""
    table = _table(counts)
    total, both = int(table.sum()), int((table**2).sum())
    by_row, by_column = (int((table.sum(axis) ** 2).sum()) for axis in (1, 0))
    if not total:
        return math.nan
    # Of all ordered pairs of images, those that lie together in both, in one alone, and in neither.
    together, row_alone, column_alone = both - total, by_row - both, by_column - both
    apart = total**2 - by_row - by_column + both
    if row_alone == column_alone == 0:
        return 1.0
    chance = (together + row_alone) * (row_alone + apart) + (together + column_alone) * (column_alone + apart)
    return 2 * (together * apart - row_alone * column_alone) / chance


def pair_counts(clusters: Tensor, num_clusters: int) -> Tensor:
    """Count how many images each two sub-heads put into which two clusters.

    Args:
        clusters: (M, H) int64, the cluster of each image by each sub-head, in [0, K).
        num_clusters: K.

    Returns:
        (H (H - 1) / 2, K, K) int64; the pairs of sub-heads stand in the order of `sub_head_agreement`. The sum over
        shards is that of the whole.
    """
    k, num_sub_heads = num_clusters, clusters.shape[1]
    pairs = [count_matrix(clusters[:, :h], clusters[:, h], k, k) for h in range(1, num_sub_heads)]
    return torch.cat(pairs) if pairs else clusters.new_zeros(0, k, k)


def sub_head_agreement(counts: Tensor, num_sub_heads: int) -> np.ndarray:
    """Return the ARI of each two sub-heads, (H, H) symmetric with ones in the diagonal.

    Args:
        counts: (H (H - 1) / 2, K, K), from `pair_counts`: the pairs (0, 1), (0, 2), (1, 2), (0, 3), ...
        num_sub_heads: H.
    """
    matrix = np.eye(num_sub_heads)
    pairs = ((a, b) for b in range(1, num_sub_heads) for a in range(b))
    for (a, b), table in zip(pairs, _table(counts), strict=True):
        matrix[a, b] = matrix[b, a] = ari(table)
    return matrix


def summarize(counts: Tensor | np.ndarray, selected: int) -> dict[str, Any]:
    """Judge all sub-heads of a clustering head against the labels.

    Args:
        counts: (H, K, C).
        selected: the sub-head that was chosen without labels.

    Returns:
        {"accuracy": {"selected", "mean", "std", "best"}, "nmi", "ari"}; NMI and ARI are those of `selected`.
    """
    tables = _table(counts)
    accuracies = np.array([accuracy(table) for table in tables])
    return {
        "accuracy": {
            "selected": float(accuracies[selected]),
            "mean": float(accuracies.mean()),
            "std": float(accuracies.std()),
            "best": float(accuracies.max()),
        },
        "nmi": nmi(tables[selected]),
        "ari": ari(tables[selected]),
    }


KMEANS_SAMPLE = 20_000
"""Images that k-means looks for its middles in, at most twice as many; all are put to the nearest."""

_BLOCK = 8192
"""Images that are put to the nearest middle at a time."""


def kmeans_accuracy(images: Tensor, labels: Tensor, num_clusters: int, seed: int = 0) -> float:
    """Return the accuracy of k-means on raw pixels or features, the baseline that any clustering has to beat.

    Args:
        images: (M, C, H, W) uint8, or features (M, F), floating point, whose directions from their mean count; on the
            CPU, perhaps mapped: some thousand are looked at at a time.
        labels: (M,) int64; -1 for an image that does not count.
        num_clusters: K.
        seed: of the ten starts, of which the one of lowest inertia counts.
    """
    from sklearn.cluster import KMeans  # a second to import, and only this needs it

    blocks = images.split(_BLOCK)
    mean = None
    if images.dtype != torch.uint8:
        mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / len(images)
    sample = images[:: max(1, len(images) // KMEANS_SAMPLE)]
    kmeans = KMeans(min(num_clusters, len(sample)), n_init=10, random_state=seed).fit(_points(sample, mean))
    assigned = np.concatenate([kmeans.predict(_points(block, mean)) for block in blocks])
    predictions = torch.from_numpy(assigned).long().unsqueeze(1)
    return accuracy(count_matrix(predictions, labels, num_clusters, int(labels.max()) + 1)[0])


def _points(images: Tensor, mean: Tensor | None) -> np.ndarray:
    """Return pixels in [0, 1], or where there is a mean the directions of features from it: (n, F) float32."""
    if mean is None:
        return (images.flatten(1).float() / 255).numpy()
    return torch.nn.functional.normalize(images.float() - mean.float()).numpy()


def _table(counts: Tensor | np.ndarray) -> np.ndarray:
    return counts.cpu().numpy() if isinstance(counts, Tensor) else np.asarray(counts)


def _assignments(counts: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return one cluster and one class per counted image, as scikit-learn wants them."""
    table = _table(counts)
    clusters, classes = np.nonzero(table)
    repeats = table[clusters, classes]
    return np.repeat(clusters, repeats), np.repeat(classes, repeats)
