"""The graph of nearest neighbours: how alike two images are, and the few coordinates in which its parts lie apart."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

_ROWS = 8192  # images whose similarities are computed together
_HALVINGS = 64  # of the interval in which a row's scale is sought
_DENSE = 400  # images up to which all eigenvectors are computed at once
_TOLERANCE = 1e-3  # of the eigenvalues: k-means does not see the rest


def similarities(vectors: Tensor, neighbours: Tensor) -> Tensor:
    """Return the cosines of images and their neighbours, (N, k) float64 on the CPU.

    Args:
        vectors: (N, D) of any length, on any device, or mapped.
        neighbours: (N, k) int64 on the CPU.
    """
    found = []
    for rows in torch.arange(len(vectors)).split(_ROWS):
        own = torch.nn.functional.normalize(vectors[rows].double(), dim=1)
        columns = [
            (own * torch.nn.functional.normalize(vectors[column].double(), dim=1)).sum(1).cpu()
            for column in neighbours[rows].unbind(1)
        ]
        found.append(torch.stack(columns, 1))
    return torch.cat(found)


def weighted_graph(neighbours: Tensor, cosines: Tensor) -> scipy.sparse.csr_matrix:
    """Weigh the edges to the nearest neighbours, (N, N) symmetric, float64.

    Edge (i, j) has exp(-(d_ij - d_i) / s_i), with d = 1 - cosine, d_i that of the nearest, and s_i so that the edges of
    a row sum to log2 k; both directions a, b of an edge become a + b - ab. Where images lie thinly all are as near as
    in a crowd.

    Args:
        neighbours: (N, k) int64.
        cosines: (N, k), of images and their neighbours.

    Source: McInnes et al., UMAP, arXiv:1802.03426, section 3.1.
    """
    count, k = neighbours.shape
    distances = np.maximum(1 - cosines.numpy().astype(np.float64), 0)
    excess = distances - distances.min(1, keepdims=True)
    low, high, scale = np.zeros(count), np.full(count, np.inf), np.ones(count)
    for _ in range(_HALVINGS):
        above = np.exp(-excess / scale[:, None]).sum(1) > np.log2(max(k, 2))
        high, low = np.where(above, scale, high), np.where(above, low, scale)
        # Equal neighbours fill a row at any scale: it stays above zero.
        scale = np.maximum(np.where(np.isinf(high), 2 * scale, (low + high) / 2), 1e-12)
    weights = np.exp(-excess / scale[:, None])
    rows = np.repeat(np.arange(count), k)
    graph = scipy.sparse.csr_matrix((weights.ravel(), (rows, neighbours.numpy().ravel())), (count, count))
    return (graph + graph.T - graph.multiply(graph.T)).tocsr()


def spectral_coordinates(graph: scipy.sparse.csr_matrix, dimensions: int, seed: int) -> np.ndarray:
    """Return the leading eigenvectors of D^-1/2 A D^-1/2, (N, at most dimensions) float64, largest eigenvalue first.

    On one thread, so that the number of threads decides nothing.

    Args:
        graph: A, (N, N), symmetric, no row without an edge.
        dimensions: At most N.
        seed: Of the first vector of the iteration.

    Source: Ng, Jordan, Weiss, On spectral clustering, NIPS 2001.
    """
    count = graph.shape[0]
    root = scipy.sparse.diags(1 / np.sqrt(np.asarray(graph.sum(1)).ravel()))
    normalised = root @ graph @ root
    with threadpool_limits(1):
        if count <= max(_DENSE, 2 * dimensions + 1):
            values, vectors = np.linalg.eigh(normalised.toarray())
        else:
            first = np.random.default_rng(seed).normal(size=count)
            try:
                values, vectors = scipy.sparse.linalg.eigsh(
                    normalised, dimensions, which="LA", v0=first, tol=_TOLERANCE
                )
            except scipy.sparse.linalg.ArpackNoConvergence as some:  # those that are found will do
                values, vectors = some.eigenvalues, some.eigenvectors
    return vectors[:, np.argsort(-values, kind="stable")[:dimensions]]
