"""The graph of neighbours and its spectral coordinates, against plain loops and SciPy's dense eigenvectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from neighbour_tasks import blobs
from scipy.optimize import brentq
from sklearn.metrics.pairwise import cosine_similarity

from iic_dist.ops.nearest import nearest
from iic_dist.training import graph
from iic_dist.training.graph import similarities, spectral_coordinates, weighted_graph

pytestmark = pytest.mark.usefixtures("one_thread")


def vectors_and_neighbours(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    vectors = torch.nn.functional.normalize(blobs(n, 6, noise=2))  # one part: eigenvalues of several are equal
    return vectors, nearest(vectors, 0, vectors, k)


def test_similarities_are_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, near = vectors_and_neighbours(50, 5)
    monkeypatch.setattr(graph, "_ROWS", 16)
    expected = np.take_along_axis(cosine_similarity(vectors), near.numpy(), 1)
    np.testing.assert_allclose(similarities(3 * vectors.float(), near), expected, atol=1e-6)


def test_weights_are_those_of_the_paper() -> None:
    """Each row's scale from a root finder of SciPy's, both directions joined by hand."""
    vectors, near = vectors_and_neighbours(40, 6)
    cosines = similarities(vectors, near)
    directed = np.zeros((40, 40))
    for row in range(40):
        excess = (1 - cosines[row]).numpy()
        excess -= excess.min()
        scale = brentq(lambda s, excess=excess: np.exp(-excess / s).sum() - math.log2(6), 1e-6, 1e3, xtol=1e-14)
        directed[row, near[row]] = np.exp(-excess / scale)
    expected = directed + directed.T - directed * directed.T
    np.testing.assert_allclose(weighted_graph(near, cosines).toarray(), expected, atol=1e-9)


def test_duplicates_and_single_neighbours_have_weights() -> None:
    """Equal distances fill a row at any scale: the search went to 0, and 0 / 0."""
    near = nearest(torch.ones(9, 3), 0, torch.ones(9, 3), 4)
    weights = weighted_graph(near, similarities(torch.ones(9, 3), near)).toarray()
    assert set(np.unique(weights)) == {0.0, 1.0}
    vectors, near = vectors_and_neighbours(9, 1)
    assert np.isfinite(weighted_graph(near, similarities(vectors, near)).toarray()).all()


@pytest.mark.parametrize("dense", [0, 400])
def test_coordinates_are_the_leading_eigenvectors(monkeypatch: pytest.MonkeyPatch, dense: int) -> None:
    """By either way, with a finer tolerance than k-means needs; up to signs, so projectors are compared."""
    monkeypatch.setattr(graph, "_DENSE", dense)
    monkeypatch.setattr(graph, "_TOLERANCE", 1e-10)
    vectors, near = vectors_and_neighbours(120, 8)
    weights = weighted_graph(near, similarities(vectors, near))
    degrees = np.asarray(weights.sum(1)).ravel()
    normalised = weights.toarray() / np.sqrt(np.outer(degrees, degrees))
    values, expected = scipy.linalg.eigh(normalised)
    found = spectral_coordinates(weights, 4, seed=1)
    np.testing.assert_allclose(found @ found.T, expected[:, -4:] @ expected[:, -4:].T, atol=1e-6)
    np.testing.assert_allclose(np.diag(found.T @ normalised @ found), values[:-5:-1], atol=1e-8)
    assert np.array_equal(found, spectral_coordinates(weights, 4, seed=1))


def test_what_does_not_converge_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """ARPACK raises with the eigenvectors that it has found."""

    def fails(*arguments: object, **named: object) -> None:
        raise scipy.sparse.linalg.ArpackNoConvergence("", np.array([0.5, 0.9]), np.eye(120)[:, :2])

    monkeypatch.setattr(graph, "_DENSE", 0)
    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", fails)
    vectors, near = vectors_and_neighbours(120, 8)
    found = spectral_coordinates(weighted_graph(near, similarities(vectors, near)), 4, seed=1)
    assert np.array_equal(found, np.eye(120)[:, [1, 0]])
