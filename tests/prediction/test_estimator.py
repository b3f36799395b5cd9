"""The estimator, by scikit-learn's own checks and beside its k-means."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import parametrize_with_checks

import iic_dist
from iic_dist.evaluation import metrics
from iic_dist.models.fourier_features import WIDTH, FourierFeatures, draw_frequencies
from iic_dist.prediction.estimator import FEW_COLUMNS, IICClustering

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"n_steps": 200, "random_state": 0}


def count_matrix(clusters: np.ndarray, classes: np.ndarray) -> torch.Tensor:
    k = int(max(clusters.max(), classes.max())) + 1
    return metrics.count_matrix(torch.from_numpy(clusters)[:, None], torch.from_numpy(classes), k, k)[0]


def accuracy(clusters: np.ndarray, classes: np.ndarray) -> float:
    return metrics.accuracy(count_matrix(clusters, classes))


def small_blobs(dtype: type = np.float64, columns: int = 40) -> np.ndarray:
    return datasets.make_blobs(120, columns, centers=4, random_state=0)[0].astype(dtype)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    return datasets.load_digits(return_X_y=True)


@pytest.fixture(scope="module")
def fitted(digits: tuple[np.ndarray, np.ndarray]) -> IICClustering:
    return IICClustering(random_state=0).fit(digits[0])


# No check is expected to fail. The one on array API inputs is skipped where SCIPY_ARRAY_API is not set, as for KMeans.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([IICClustering(n_steps=200), IICClustering(n_steps=200, kernel="cosine", n_init=1)])
def test_scikit_learns_checks(estimator: IICClustering, check: Any) -> None:
    check(estimator)


def test_digits_beside_kmeans(digits: tuple[np.ndarray, np.ndarray], fitted: IICClustering) -> None:
    pixels, classes = digits
    ours = accuracy(fitted.labels_, classes)
    theirs = accuracy(KMeans(10, n_init=10, random_state=0).fit_predict(pixels).astype(np.int64), classes)
    assert ours > theirs + 0.05, f"{ours:.3f} beside {theirs:.3f} of KMeans"


@pytest.mark.parametrize(("columns", "clusters"), [(1, 3), (2, 8), (3, 8), (10, 10), (50, 10)])
def test_blobs_beside_kmeans(columns: int, clusters: int) -> None:
    """Angles around the mean alone reached 0.78 in the plane: clusters lie behind each other there."""
    spread = {1: 0.1, 2: 0.6}.get(columns, 1.0)
    centers = np.arange(clusters)[:, None] if columns == 1 else clusters
    X, classes = datasets.make_blobs(1000, columns, centers=centers, cluster_std=spread, random_state=0)
    ours = accuracy(IICClustering(clusters, **QUICK).fit_predict(X), classes)
    theirs = accuracy(KMeans(clusters, n_init=10, random_state=0).fit_predict(X).astype(np.int64), classes)
    assert ours > theirs - 0.01, f"{ours:.3f} beside {theirs:.3f} of KMeans"


def test_the_rows_of_fit_are_predicted_as_their_labels(
    digits: tuple[np.ndarray, np.ndarray], fitted: IICClustering
) -> None:
    probabilities = fitted.predict_proba(digits[0])
    assert np.array_equal(fitted.predict(digits[0]), fitted.labels_)
    assert np.array_equal(probabilities.argmax(1), fitted.labels_)
    assert np.array_equal(probabilities.max(1), fitted.confidence_)
    assert np.allclose(probabilities.sum(1), 1)
    assert fitted.labels_.dtype == np.int64
    assert fitted.n_features_in_ == 64


def test_new_rows_are_clustered_as_well_as_old_ones(digits: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, classes = digits
    clustering = IICClustering(**QUICK).fit(pixels[:1200])
    old, new = (accuracy(clustering.predict(pixels[rows]), classes[rows]) for rows in (slice(1200), slice(1200, None)))
    assert new > old - 0.06


def test_confidence_and_agreement_say_where_labels_are_right(
    digits: tuple[np.ndarray, np.ndarray], fitted: IICClustering
) -> None:
    assert ((fitted.confidence_ >= 0.1) & (fitted.confidence_ <= 1)).all()
    assert ((fitted.agreement_ >= 0) & (fitted.agreement_ <= 1)).all()
    sure = fitted.agreement_ == 1
    assert 0.1 < sure.mean() < 1
    named = metrics.match_clusters(count_matrix(fitted.labels_, digits[1]))
    right = named[fitted.labels_] == digits[1]
    assert right[sure].mean() > right[~sure].mean()


def test_the_agreement_of_one_head_is_unknown() -> None:
    clustering = IICClustering(4, n_init=1, **QUICK).fit(small_blobs())
    assert np.isnan(clustering.agreement_).all()


def test_clusters_are_numbered_by_size(fitted: IICClustering) -> None:
    sizes = np.bincount(fitted.labels_)
    assert (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize("columns", [3, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_seed_repeats_the_result(dtype: type, columns: int) -> None:
    """Whatever the global generators have drawn, and they are left as they were."""
    X = small_blobs(dtype, columns)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = IICClustering(4, **QUICK).fit(X).predict_proba(X)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(3)
    assert np.array_equal(IICClustering(4, **QUICK).fit(X).predict_proba(X), first)
    assert first.dtype == dtype
    assert not np.array_equal(IICClustering(4, n_steps=200, random_state=1).fit(X).predict_proba(X), first)


def test_a_random_state_is_drawn_from_by_each_fit() -> None:
    X = small_blobs()
    clustering = IICClustering(4, n_steps=20, random_state=np.random.RandomState(5))
    first, second = clustering.fit(X).predict_proba(X), clustering.fit(X).predict_proba(X)
    assert not np.array_equal(first, second)
    again = IICClustering(4, n_steps=20, random_state=np.random.RandomState(5)).fit(X)
    assert np.array_equal(again.predict_proba(X), first)


def test_it_finds_what_the_stage_of_a_run_finds() -> None:
    """The same code with the same seed: what differs is rounding, as rows are scaled first."""
    from iic_dist.losses.objective import Objective
    from iic_dist.training.feature_space import find_neighbours, fit_space, map_features
    from iic_dist.training.head_plan import HeadTraining
    from iic_dist.training.neighbours import NeighbourTraining
    from iic_dist.training.starts import ClusterStarts

    X, cpu = small_blobs(np.float32), torch.device("cpu")
    features = torch.from_numpy(X)
    space = fit_space(features, cpu)
    vectors = map_features(features, space, cpu)
    settings = HeadTraining(steps=50, partners=1, walk=6, batch_size=1024, lr=5e-3, weight_decay=1e-2, seed=3)
    near = find_neighbours(vectors, 10, cpu)
    starts = ClusterStarts(vectors, near, 3)
    training = NeighbourTraining(vectors, near, {"c": (8, 4)}, {"c": Objective(1.0)}, settings, cpu, starts)
    while training.step < 50:
        training.train_step()
    selected = int(training.judge()["c"].loss.argmin())
    expected = training.finished(space)["c"](features)[:, selected].softmax(1).detach().numpy()
    ours = IICClustering(4, n_neighbors=10, n_steps=50, random_state=3).fit(X).predict_proba(X)
    assert np.allclose(np.sort(ours, 1), np.sort(expected, 1), atol=1e-3)


def test_far_from_zero_and_at_any_scale() -> None:
    """In float32 a million away from zero no digit of these rows would be left."""
    X = small_blobs()
    labels = IICClustering(4, **QUICK).fit_predict(X)
    for moved in (X + 1e8, X * 1e-30, X * 1e30):
        assert adjusted_rand_score(IICClustering(4, **QUICK).fit_predict(moved), labels) == 1


def test_lists_half_precision_and_integers() -> None:
    X = small_blobs().round()
    expected = IICClustering(4, **QUICK).fit_predict(X)
    for other in (X.tolist(), X.astype(np.float16), X.astype(np.int32)):
        assert adjusted_rand_score(IICClustering(4, **QUICK).fit_predict(other), expected) == 1


@pytest.mark.parametrize(
    "X", [np.ones((30, 5)), np.full((30, 40), 0.1), np.repeat([[0.0, 1.0], [1.0, 0.0]], 15, axis=0)]
)
def test_fewer_different_rows_than_clusters_are_said(X: np.ndarray) -> None:
    """Rows that are all the same have no directions, and their mean may round to another number."""
    with pytest.warns(ConvergenceWarning, match=r"of n_clusters=4 clusters are used"):
        clustering = IICClustering(4, n_steps=50, random_state=0).fit(X)
    assert np.isfinite(clustering.predict_proba(X)).all()
    assert set(clustering.labels_) == set(range(clustering.labels_.max() + 1))


@pytest.mark.parametrize("columns", [1, 2, FEW_COLUMNS, FEW_COLUMNS + 1])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_few_rows(rows: int, columns: int) -> None:
    X = np.random.default_rng(0).normal(size=(rows, columns))
    for clusters in {1, 2, rows} - set(range(rows + 1, 9)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            clustering = IICClustering(clusters, n_steps=5, random_state=0).fit(X)
        assert np.isfinite(clustering.predict_proba(X)).all()
        assert np.array_equal(clustering.predict(X), clustering.labels_)


def test_one_cluster_holds_all() -> None:
    clustering = IICClustering(1).fit(small_blobs())
    assert (clustering.labels_ == 0).all()
    assert clustering.predict_proba(small_blobs()).shape == (120, 1)


@pytest.mark.parametrize(
    ("parameters", "X", "message"),
    [
        ({}, [[0.0, np.nan]] * 20, "X holds NaN in row 0, column 1 (20 numbers are not finite)"),
        ({}, [[0.0, 1.0], [np.inf, 1.0]] * 10, "X holds inf in row 1, column 0"),
        ({"n_clusters": 30}, [[0.0, 1.0]] * 20, "n_samples=20 should be >= n_clusters=30"),
        ({"n_clusters": 0}, [[0.0, 1.0]] * 20, "n_clusters == 0, must be >= 1"),
        ({"entropy_weight": 0.0}, [[0.0, 1.0]] * 20, "entropy_weight == 0.0, must be > 0"),
        ({"kernel": "poly"}, [[0.0, 1.0]] * 20, "kernel='poly': must be one of auto, cosine, gaussian"),
        ({"device": "abacus"}, [[0.0, 1.0]] * 20, "device='abacus': must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, [[0.0, 1.0]] * 20, "device='cuda:99': torch sees"),
    ],
)
def test_what_it_refuses(parameters: dict[str, Any], X: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        IICClustering(**parameters).fit(X)
    assert "\n" not in str(caught.value)


def test_unfitted_it_says_so() -> None:
    with pytest.raises(NotFittedError):
        IICClustering().predict([[0.0]])


def test_pickles_clones_and_sets() -> None:
    X = small_blobs()
    clustering = IICClustering(4, **QUICK).fit(X)
    copied = pickle.loads(pickle.dumps(clustering))
    assert np.array_equal(copied.predict_proba(X), clustering.predict_proba(X))
    fresh = clone(clustering).set_params(n_clusters=3)
    assert fresh.get_params() == {**clustering.get_params(), "n_clusters": 3}
    assert set(fresh.fit_predict(X)) == {0, 1, 2}


def test_names_of_columns() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(small_blobs(), columns=[f"c{i}" for i in range(40)])
    clustering = IICClustering(4, **QUICK).fit(frame)
    assert list(clustering.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        clustering.predict(frame.rename(columns={"c0": "other"}))


def test_the_package_hands_it_on_and_loads_it_late() -> None:
    assert iic_dist.IICClustering is IICClustering
    with pytest.raises(AttributeError, match="has no attribute 'KMeans'"):
        _ = iic_dist.KMeans
    program = "import sys, iic_dist; print(*sys.modules); iic_dist.IICClustering; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = (set(line.split()) for line in ran.stdout.splitlines())
    assert not before & {"torch", "sklearn", "numpy"}
    assert {"torch", "sklearn"} <= after


def test_fourier_features_hold_a_gaussian_kernel() -> None:
    rows = torch.from_numpy(small_blobs(columns=3))
    waves = FourierFeatures(draw_frequencies(rows, seed=0))(rows)
    distances = torch.cdist(rows, rows)
    width = WIDTH * torch.pdist(rows).median()
    expected = torch.exp(-(distances**2) / (2 * width**2))
    assert (waves @ waves.T / (waves.shape[1] / 2) - expected).abs().mean() < 0.1
