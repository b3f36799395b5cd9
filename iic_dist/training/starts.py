"""Where clustering heads may start: at clusters of the graph of neighbours or of k-means, as linear heads say them."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from iic_dist import distributed
from iic_dist.training.graph import similarities, spectral_coordinates, weighted_graph

SHARES = (1.0, 1.25, 1.5)
"""Spectral coordinates that are clustered, in clusters: with more of them other parts of the graph come apart."""

STEEPNESS = 8.0
"""Difference of the logits of an image that surely is in a cluster and one that surely is not."""

_RIDGE = 1e-2  # share of the vectors' mean variance that is added to all
_MOST_ROWS = 50_000  # images that are clustered; more would take minutes and say the same
_MOST_VECTORS = 10_000  # by k-means on the vectors themselves
_KMEANS_STARTS = 5  # the best of so many; of many clusters one, which takes long enough


class ClusterStarts:
    """Finds clusters, each time other ones, and the linear heads that say them.

    Two thirds are clusters of the graph of neighbours, which keep classes of few images. The others are those of
    k-means on the vectors, which find classes that the graph has cut in two, as writing of two kinds.

    Args:
        vectors: (N, D) of one length that the heads will see; on any device, or mapped.
        neighbours: (N, k) int64 on the CPU.
        seed: Of the iterations' first values.
    """

    def __init__(self, vectors: Tensor, neighbours: Tensor, seed: int) -> None:
        self.vectors, self.neighbours, self.seed = vectors, neighbours, seed
        self._graph: scipy.sparse.csr_matrix | None = None

    def __call__(self, num_clusters: int, count: int) -> Tensor:
        """Return weights (S, K, D) float64 on the CPU; biases are zero.

        Start r of the graph is k-means of one start on the leading spectral coordinates, rows of length 1, as many as
        `SHARES` says; then ridge regression of the clusters on the vectors, times `STEEPNESS`. So is one of the
        vectors, with k-means on these.

        Args:
            num_clusters: K; of fewer images some have no weight.
            count: S; a third of them, rounded down, are the last ones and of the vectors.

        Collective: all ranks must call; rank 0 finds them for all.
        """
        found = None
        if distributed.rank() == 0:
            of_vectors = count // 3
            found = torch.cat(
                [self._of_graph(num_clusters, count - of_vectors), self._of_vectors(num_clusters, of_vectors)]
            )
        distributed.wait_patiently()  # of many images the coordinates take longer than a step may
        weights = distributed.broadcast(found)
        assert weights is not None
        return weights

    def _rows(self, most: int) -> Tensor:
        """Choose not more images than that, spread over all."""
        return torch.arange(0, len(self.vectors), -(-len(self.vectors) // most))

    def _of_graph(self, num_clusters: int, count: int) -> Tensor:
        if self._graph is None:
            self._graph = weighted_graph(self.neighbours, similarities(self.vectors, self.neighbours))
        rows = self._rows(_MOST_ROWS)
        wanted = [max(2, round(share * num_clusters)) for share in SHARES]
        coordinates = spectral_coordinates(self._graph, min(len(self.vectors), max(wanted)), self.seed)[rows]
        clusters = []
        for start in range(count):
            points = coordinates[:, : wanted[start % len(wanted)]]
            points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
            clusters.append(self._kmeans(points, num_clusters, start, 1))
        return _linear_heads(self.vectors[rows].double().cpu(), np.stack(clusters), num_clusters)

    def _of_vectors(self, num_clusters: int, count: int) -> Tensor:
        vectors = self.vectors[self._rows(_MOST_VECTORS)].double().cpu()
        if not count:
            return vectors.new_empty(0, num_clusters, vectors.shape[1])
        best_of = max(1, min(_KMEANS_STARTS, 500 // num_clusters))
        clusters = [self._kmeans(vectors.numpy(), num_clusters, start, best_of) for start in range(count)]
        return _linear_heads(vectors, np.stack(clusters), num_clusters)

    def _kmeans(self, points: np.ndarray, num_clusters: int, start: int, best_of: int) -> np.ndarray:
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters
            kmeans = KMeans(min(num_clusters, len(points)), n_init=best_of, random_state=(self.seed + start) % 2**32)
            return np.asarray(kmeans.fit_predict(points))


def _linear_heads(vectors: Tensor, clusters: np.ndarray, num_clusters: int) -> Tensor:
    """Return the weights (S, K, D) of ridge regressions of clusters (S, N) on vectors (N, D)."""
    width = vectors.shape[1]
    gram = vectors.T @ vectors / len(vectors)
    ridge = _RIDGE * float(gram.trace()) / width or 1.0  # vectors that are all zero have no variance
    gram += ridge * torch.eye(width, dtype=gram.dtype)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(clusters).long(), num_clusters).double()
    sums = torch.einsum("snk,nd->skd", one_hot - one_hot.mean(1, keepdim=True), vectors) / len(vectors)
    return STEEPNESS * torch.linalg.solve(gram, sums.flatten(0, 1).T).T.view_as(sums)
