"""Heads that start at clusters of the graph of neighbours and of k-means."""

from __future__ import annotations

import neighbour_tasks
import numpy as np
import pytest
import torch
from neighbour_tasks import blobs, on
from ranks import Ranks
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge
from sklearn.metrics import adjusted_rand_score

from iic_dist.ops.nearest import nearest
from iic_dist.training import starts
from iic_dist.training.starts import ClusterStarts, _linear_heads

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_linear_head_is_a_ridge_regression_of_its_clusters() -> None:
    vectors = blobs(60, 7)
    vectors -= vectors.mean(0)
    clusters = np.random.default_rng(0).integers(0, 4, (2, 60))
    found = _linear_heads(vectors, clusters, 4)
    penalty = 1e-2 * float((vectors.T @ vectors).trace()) / 7
    for start in range(2):
        one_hot = np.eye(4)[clusters[start]]
        expected = Ridge(alpha=penalty, fit_intercept=False).fit(vectors.numpy(), one_hot - one_hot.mean(0)).coef_
        np.testing.assert_allclose(found[start], starts.STEEPNESS * expected, atol=1e-9)


@pytest.mark.parametrize("most_rows", [50_000, 100])
def test_starts_find_blobs(monkeypatch: pytest.MonkeyPatch, most_rows: int) -> None:
    """Each of them, also where only some images are clustered."""
    for name in ("_MOST_ROWS", "_MOST_VECTORS"):
        monkeypatch.setattr(starts, name, most_rows)
    vectors = 5 * torch.nn.functional.normalize(blobs(300, 10, noise=0.2))
    weights = ClusterStarts(vectors, nearest(vectors, 0, vectors, 8), 0)(5, 3)
    assert weights.shape == (3, 5, 10)
    for weight in weights:
        assert adjusted_rand_score(torch.arange(300) % 5, (vectors @ weight.T).argmax(1)) == 1


def test_the_last_third_is_k_means_on_the_vectors() -> None:
    """The best of several starts, as scikit-learn finds it from the same seeds; the others are as many as before."""
    vectors = torch.nn.functional.normalize(blobs(200, 10, noise=1)).double()
    near = nearest(vectors, 0, vectors, 6)
    found = ClusterStarts(vectors, near, 2)(5, 7)
    assert torch.equal(found[:5], ClusterStarts(vectors, near, 2)._of_graph(5, 5))
    for place, seed in ((5, 2), (6, 3)):
        clusters = KMeans(5, n_init=starts._KMEANS_STARTS, random_state=seed).fit_predict(vectors.numpy())
        torch.testing.assert_close(found[place], _linear_heads(vectors, clusters[None], 5)[0], rtol=0, atol=1e-9)


def test_starts_differ_and_depend_on_the_seed() -> None:
    vectors = torch.nn.functional.normalize(blobs(200, 10, noise=2))
    near = nearest(vectors, 0, vectors, 6)
    first = ClusterStarts(vectors, near, 0)(6, 8)
    assert len(torch.unique(first, dim=0)) > 4
    assert torch.equal(first, ClusterStarts(vectors, near, 0)(6, 8))
    assert not torch.equal(first, ClusterStarts(vectors, near, 1)(6, 8))


@pytest.mark.parametrize("count", [3, 4])
def test_more_clusters_than_images_leave_some_without_weights(count: int) -> None:
    vectors = blobs(count, 5)
    weights = ClusterStarts(vectors, nearest(vectors, 0, vectors, count - 1), 0)(6, 3)
    assert weights.shape == (3, 6, 5)
    assert weights.isfinite().all()
    assert not weights[:, count:].any()


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_start_as_one_does(pools: dict[int, Ranks], world_size: int) -> None:
    vectors = blobs(90, 8)
    near = nearest(vectors, 0, vectors, 6)
    [one] = on(1, pools, neighbour_tasks.started, vectors, near)
    assert all(torch.equal(found, one) for found in on(world_size, pools, neighbour_tasks.started, vectors, near))
