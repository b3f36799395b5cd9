"""The space of features against SciPy's generalised eigenproblem, and neighbours on any number of ranks."""

from __future__ import annotations

import neighbour_tasks
import numpy as np
import pytest
import scipy.linalg
import torch
from neighbour_tasks import CPU, blobs, on, unit_rows
from ranks import Ranks
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from iic_dist.errors import UsageError
from iic_dist.training import feature_space
from iic_dist.training.feature_space import fit_space, map_features

pytestmark = pytest.mark.usefixtures("one_thread")


def vectors_by_hand(features: np.ndarray, whitening: float = 0.0) -> np.ndarray:
    """What the space makes of its own features, up to a rotation; every pair of neighbours is written out."""
    n, f = features.shape
    directions = features - features.mean(0)
    covariance = np.atleast_2d(np.cov(features.T, bias=True))
    covariance += feature_space.RIDGE * np.trace(covariance) / f * np.eye(f)
    directions @= np.real(scipy.linalg.fractional_matrix_power(covariance, -whitening / 2))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    k = min(feature_space.NEAREST, (n - 1) // 2)
    near = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(directions).kneighbors()[1]
    centred = directions - directions.mean(0)
    kept = min(f, feature_space.DIMENSIONS)
    _, _, axes = np.linalg.svd(centred)
    y = centred @ axes[:kept].T
    first, second = y.repeat(k, 0), y[near.reshape(-1)]
    both = np.concatenate([first, second])
    own = both.T @ both / len(both)
    shared = (first.T @ second + second.T @ first) / len(both)
    own += feature_space.RIDGE * np.trace(own) / kept * np.eye(kept)
    correlations, canonical = scipy.linalg.eigh(shared, own)  # of columns u: u^T own u = 1
    share = np.maximum(correlations, 0) ** feature_space.POWER if correlations.max() > 0 else np.ones(kept)
    projected = y @ canonical @ np.diag(share)
    return 5 * projected / np.linalg.norm(projected, axis=1, keepdims=True)


def vectors_of(features: Tensor, whitening: float = 0.0) -> Tensor:
    features = features.double()
    return map_features(features, fit_space(features, CPU, torch.float64, whitening=whitening), CPU)


@pytest.mark.parametrize("whitening", [0.0, 0.75, 1.0])
@pytest.mark.parametrize(("n", "f"), [(200, 12), (90, 1), (3, 2), (9, 4), (40, 60), (400, 300)])
def test_the_space_is_that_of_the_generalised_eigenproblem(n: int, f: int, whitening: float) -> None:
    """Also one dimension, fewer images than dimensions, and more dimensions than are kept."""
    features = blobs(n, f)
    made, expected = vectors_of(features, whitening).numpy(), vectors_by_hand(features.numpy(), whitening)
    np.testing.assert_allclose(made @ made.T, expected @ expected.T, rtol=0, atol=1e-9)


def test_full_whitening_forgets_the_units_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the ridge; without whitening the largest units decide what is near."""
    monkeypatch.setattr(feature_space, "RIDGE", 1e-12)
    features = blobs(400, 6).double()
    units = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.7], dtype=torch.float64)
    plain, other = vectors_of(features, 1.0), vectors_of(features * units, 1.0)
    torch.testing.assert_close(other @ other.T, plain @ plain.T, rtol=0, atol=1e-6)
    plain, other = vectors_of(features), vectors_of(features * units)
    assert float((other @ other.T - plain @ plain.T).abs().max()) > 5.0  # of 25


@pytest.mark.parametrize("whitening", [0.0, 0.75])
def test_the_space_does_not_depend_on_parts_or_on_how_numbers_are_kept(
    monkeypatch: pytest.MonkeyPatch, whitening: float
) -> None:
    features = blobs(130, 9).half()
    whole = vectors_of(features, whitening)
    monkeypatch.setattr(feature_space, "_ROWS", 32)
    torch.testing.assert_close(vectors_of(features, whitening), whole, rtol=0, atol=1e-9)
    single = fit_space(features, CPU, whitening=whitening)
    assert single.projection.dtype == torch.float32
    made = map_features(features, single, CPU).double()
    torch.testing.assert_close(made @ made.T, whole @ whole.T, rtol=0, atol=1e-3)


def test_vectors_above_the_budget_lie_in_a_file() -> None:
    features = blobs(50, 4)
    space = fit_space(features, CPU, torch.float64)
    assert torch.equal(map_features(features, space, CPU, budget_gib=0), map_features(features, space, CPU))


def test_the_turn_is_a_rotation_that_is_always_the_same() -> None:
    turn = feature_space._turn(40)
    torch.testing.assert_close(turn @ turn.T, torch.eye(40, dtype=torch.float64))
    assert torch.equal(turn, feature_space._turn(40))
    assert float(turn.abs().max()) < 0.9  # of all axes, not of a few


def test_duplicates_lie_on_one_point() -> None:
    features = torch.cat([blobs(30, 5), blobs(30, 5)])
    vectors = vectors_of(features)
    assert vectors.isfinite().all()
    torch.testing.assert_close(vectors[:30], vectors[30:])
    many = torch.cat([blobs(2, 5), blobs(1, 5).repeat(40, 1)])
    assert vectors_of(many).isfinite().all()


def test_a_few_images_lie_on_different_points() -> None:
    """With all others as neighbours every direction is shared less than nothing, and all vectors were 0."""
    for n in range(3, 13):
        vectors = vectors_of(blobs(n, 4))
        torch.testing.assert_close(vectors.norm(dim=1), torch.full((n,), 5.0, dtype=torch.float64))
        assert torch.pdist(vectors).max() > 5


@pytest.mark.parametrize("kind", ["same", "same in rounded numbers", "NaN", "infinite", "too large"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("whitening", [0.0, 0.75])
def test_features_that_have_no_space_are_one_line_on_all_ranks(
    pools: dict[int, Ranks], kind: str, world_size: int, whitening: float
) -> None:
    """An error of rank 0 alone would leave the others waiting."""
    features = blobs(40, 6).float()
    if kind.startswith("same"):
        features = torch.full((40, 6), 0.1 if "rounded" in kind else 2.0)
    elif kind == "too large":
        features *= 1e30
    else:
        features[7, 3] = torch.nan if kind == "NaN" else torch.inf
    said = on(world_size, pools, neighbour_tasks.why_no_space, features, whitening)
    wanted = "not finite" if kind in ("NaN", "infinite") else "all the same, or too large"
    assert all(wanted in each and "40 images" in each and "\n" not in each for each in said)
    assert len(set(said)) == 1


def test_the_errors_are_those_of_usage() -> None:
    with pytest.raises(UsageError):
        fit_space(torch.full((5, 2), torch.nan), CPU)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_space_is_the_same_on_any_number_of_ranks(pools: dict[int, Ranks], world_size: int) -> None:
    features = blobs(70, 8)
    [one] = on(1, pools, neighbour_tasks.space_of, features)
    for parts in on(world_size, pools, neighbour_tasks.space_of, features):
        assert all(map(torch.equal, parts, one))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "k", "block"), [(100, 7, 16), (10, 9, 16), (3, 2, 1)])
def test_neighbours_are_those_of_scikit_learn_on_any_number_of_ranks(
    pools: dict[int, Ranks], world_size: int, n: int, k: int, block: int
) -> None:
    """Also with fewer blocks than ranks."""
    vectors = unit_rows(n, 6)
    expected = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(vectors.numpy()).kneighbors()[1]
    for found in on(world_size, pools, neighbour_tasks.neighbours_of, vectors, k, block):
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_neighbours_of_duplicates_are_the_same_on_any_number_of_ranks(pools: dict[int, Ranks], world_size: int) -> None:
    """Ties go by the lower index, and products round in the same way, in float32 too."""
    vectors = torch.cat([unit_rows(25, 6)] * 3).float()
    [one] = on(1, pools, neighbour_tasks.neighbours_of, vectors, 8, 16)
    for found in on(world_size, pools, neighbour_tasks.neighbours_of, vectors, 8, 16):
        assert torch.equal(found, one)
    assert not (one == torch.arange(75).unsqueeze(1)).any()
