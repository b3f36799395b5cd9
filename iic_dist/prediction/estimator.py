"""The clustering of features as an estimator by the conventions of scikit-learn."""

from __future__ import annotations

import copy
import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from iic_dist.errors import UsageError
from iic_dist.evaluation.metrics import agreeing_share
from iic_dist.losses.objective import Objective
from iic_dist.models.feature_heads import FeatureSubHeads
from iic_dist.models.fourier_features import FourierFeatures, draw_frequencies
from iic_dist.training.feature_space import find_neighbours, fit_space, map_features
from iic_dist.training.head_plan import HeadTraining
from iic_dist.training.neighbours import NeighbourTraining
from iic_dist.training.starts import ClusterStarts

FEW_COLUMNS = 16
"""Up to so many columns `kernel="auto"` compares rows by their distance."""

_KERNELS = ("auto", "cosine", "gaussian")
_HEAD = "clustering"
_ROWS = 8192  # rows that are looked at together


class IICClustering(ClusterMixin, BaseEstimator):
    """Clusters features by linear heads that put each row and its nearest neighbours into one cluster.

    What stage *neighbours* of a run does: a projection in which rows are most like their neighbours, the nearest
    neighbours there, and heads trained together by the IIC loss on pairs of a row and the end of a random walk from
    neighbour to neighbour. They start at random, at clusters of the graph of neighbours and at those of k-means; of
    five times `n_init` the better ones go on, and the one of lowest loss over all walks is taken. Columns are neither
    scaled nor weighted. Clusters are numbered by size, largest first.

    Args:
        n_clusters: K.
        n_neighbors: Neighbours of each row, exact; of few rows at most half of what a cluster holds on average.
        n_walk: Steps of the random walk from a row to its partner. The more, the less a cut through a cluster pays, and
            the less small clusters are lost.
        n_init: Heads that are left in the end.
        n_steps: Updates of the heads. 600 are right for most sets, 100 are worse than k-means.
        n_partners: Partners of each row in a step.
        batch_size: Rows in a step; of fewer rows all.
        learning_rate: Of AdamW; it falls to zero as a cosine.
        weight_decay: Of the heads' weights.
        entropy_weight: Weight of the clusters' entropy in the loss: 1 is mutual information alone, more pushes harder
            towards clusters of equal size. Random heads explore with at least 2.
        kernel: How rows are compared. "cosine": by the angle between them as seen from their mean, what features of
            networks want. "gaussian": by distance, through random Fourier features. "auto": "gaussian" up to 16
            columns, where angles cannot tell clusters that lie behind each other, else "cosine".
        device: Where to compute: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is one.
        random_state: int, RandomState or None. An int makes the result reproducible; as `run.seed` of a run it draws
            the same first weights, batches and partners.

    Attributes:
        labels_: (n_samples,) int64, the cluster of each row. Fewer clusters than K may be used, with a
            ConvergenceWarning; numbers have no gaps.
        confidence_: (n_samples,) the probability of that cluster, in [1/K, 1].
        agreement_: (n_samples,) which share of the other heads agrees, in [0, 1]; NaN where n_init = 1. Where it is
            low, the cluster hangs on the random start.
        n_features_in_: Columns of X.
        feature_names_in_: Their names, where X has names that are all strings.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from iic_dist import IICClustering
        >>> labels = IICClustering(n_clusters=10, random_state=0).fit_predict(load_digits().data)
    """

    _network: nn.Module | None
    """Rows around 0 (B, F) -> logits (B, 1, K), on the CPU so that it can be pickled; None where there is one cluster
    to find."""

    def __init__(
        self,
        n_clusters: int = 10,
        *,
        n_neighbors: int = 15,
        n_walk: int = 6,
        n_init: int = 8,
        n_steps: int = 600,
        n_partners: int = 1,
        batch_size: int = 1024,
        learning_rate: float = 5e-3,
        weight_decay: float = 1e-2,
        entropy_weight: float = 1.0,
        kernel: str = "auto",
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_neighbors = n_neighbors
        self.n_walk = n_walk
        self.n_init = n_init
        self.n_steps = n_steps
        self.n_partners = n_partners
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.entropy_weight = entropy_weight
        self.kernel = kernel
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> IICClustering:
        """Find the clusters of the rows of X.

        Args:
            X: (n_samples, n_features) array-like of finite numbers; float32 and float64 stay what they are.
            y: Not used, there by convention.

        Raises:
            ValueError: a parameter or X will not do; the message quotes it.
        """
        self._check_parameters()
        X = self._read(X, reset=True)
        if len(X) < self.n_clusters:
            raise UsageError(f"n_samples={len(X)} should be >= n_clusters={self.n_clusters}")
        self._mean = X.mean(0, dtype=np.float64)
        self._scale = float(np.abs(X - self._mean.astype(X.dtype)).max()) or 1.0
        if self.n_clusters == 1 or bool((X[0] == X).all()):
            self._network, sub_heads, selected = None, np.zeros((len(X), 1), np.int64), 0
        else:
            sub_heads, selected = self._train(torch.from_numpy(self._centred(X).astype(np.float32, copy=False)))
        probabilities = self._probabilities(X)
        self.labels_ = probabilities.argmax(1)
        self.confidence_ = probabilities.max(1)
        sub_heads[:, selected] = self.labels_
        self.agreement_ = agreeing_share(torch.from_numpy(sub_heads), selected, self.n_clusters).numpy()
        used = int(self.labels_.max()) + 1
        if used < self.n_clusters:
            warnings.warn(
                f"{used} of n_clusters={self.n_clusters} clusters are used: X may hold too few different rows",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the cluster of each row of X, (n_samples,) int64; of the rows of `fit` it is `labels_`."""
        return self.predict_proba(X).argmax(1)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities of the clusters for each row of X, (n_samples, n_clusters) in the dtype of X."""
        check_is_fitted(self)
        return self._probabilities(self._read(X, reset=False))

    def _check_parameters(self) -> None:
        for name in ("n_clusters", "n_neighbors", "n_walk", "n_init", "n_steps", "n_partners", "batch_size"):
            check_scalar(getattr(self, name), name, Integral, min_val=1)
        for name in ("learning_rate", "entropy_weight"):
            check_scalar(getattr(self, name), name, Real, min_val=0, include_boundaries="neither")
        check_scalar(self.weight_decay, "weight_decay", Real, min_val=0)
        self._device()
        if self.kernel not in _KERNELS:
            raise UsageError(f"kernel={self.kernel!r}: must be one of {', '.join(_KERNELS)}")

    def _read(self, X: Any, reset: bool) -> np.ndarray:
        """Return X as (n_samples, n_features) float32 or float64, all finite."""
        kept = np.float32 if getattr(X, "dtype", None) == np.float16 else [np.float64, np.float32]
        # scikit-learn's own message on NaN has nine lines.
        X = validate_data(self, X, reset=reset, dtype=kept, ensure_all_finite=False)
        bad = np.argwhere(~np.isfinite(X))
        if len(bad):
            row, column = bad[0]
            what = "NaN" if np.isnan(X[row, column]) else "inf"
            raise UsageError(
                f"X holds {what} in row {row}, column {column} ({len(bad)} numbers are not finite): IICClustering "
                "takes no missing values; fill them in or drop those rows"
            )
        return X

    def _seed(self) -> int:
        if isinstance(self.random_state, (int, np.integer)):
            check_random_state(self.random_state)  # refuses what numpy would
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def _centred(self, X: np.ndarray) -> np.ndarray:
        """Return X around 0 and at most about 1, in its dtype: float32 has no digits left far from 0."""
        return (X - self._mean.astype(X.dtype)) / X.dtype.type(self._scale)

    def _train(self, centred: Tensor) -> tuple[np.ndarray, int]:
        """Train the heads and keep the best; return the clusters by all, (n_samples, n_init), and which is the best."""
        device, seed, count = self._device(), self._seed(), len(centred)
        lift: nn.Module = nn.Identity()
        if self.kernel == "gaussian" or (self.kernel == "auto" and centred.shape[1] <= FEW_COLUMNS):
            lift = FourierFeatures(draw_frequencies(centred, seed))
        features = lift(centred)
        space = fit_space(features, device)
        vectors = map_features(features, space, device)
        k = max(1, min(self.n_neighbors, count - 1, count // (2 * self.n_clusters)))
        neighbours = find_neighbours(vectors, k, device)
        settings = HeadTraining(
            steps=self.n_steps,
            partners=self.n_partners,
            walk=self.n_walk,
            batch_size=self.batch_size,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            seed=seed,
        )
        training = NeighbourTraining(
            vectors,
            neighbours,
            {_HEAD: (self.n_init, self.n_clusters)},
            {_HEAD: Objective(self.entropy_weight)},
            settings,
            device,
            ClusterStarts(vectors, neighbours, seed),
        )
        while training.step < self.n_steps:
            training.train_step()
        selected = int(training.judge()[_HEAD].loss.argmin())
        sub_heads = self._clusters(training.heads[_HEAD], vectors, device)
        with torch.random.fork_rng(devices=[]):  # modules draw first weights
            head = _by_size(training.finished(space)[_HEAD].alone(selected), sub_heads[:, selected])
        self._network = nn.Sequential(lift, head).cpu().requires_grad_(False)
        return sub_heads.numpy(), selected

    def _device(self) -> torch.device:
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except (RuntimeError, TypeError):
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"device={name!r}: must be auto, cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu")
        return device

    @staticmethod
    @torch.no_grad()
    def _clusters(head: nn.Module, vectors: Tensor, device: torch.device) -> Tensor:
        """Return the clusters of all rows by all sub-heads, (N, H) int64 on the CPU."""
        return torch.cat([head(rows.to(device)).argmax(2).cpu() for rows in vectors.split(_ROWS)])

    @torch.no_grad()
    def _probabilities(self, X: np.ndarray) -> np.ndarray:
        if self._network is None:
            return np.eye(1, self.n_clusters, dtype=X.dtype).repeat(len(X), 0)
        rows = torch.from_numpy(self._centred(X))
        network = copy.deepcopy(self._network).to(rows.dtype)
        device = self._device()
        network.to(device)
        parts = [torch.softmax(network(part.to(device))[:, 0], 1).cpu() for part in rows.split(_ROWS)]
        return torch.cat(parts).numpy()


def _by_size(head: FeatureSubHeads, clusters: Tensor) -> FeatureSubHeads:
    """Number the clusters of a single sub-head by size, largest first, given the clusters (N,) of all rows."""
    order = torch.bincount(clusters, minlength=head.shape[1]).argsort(descending=True, stable=True)
    with torch.no_grad():
        head.linear.weight.copy_(head.linear.weight[order])
        head.linear.bias.copy_(head.linear.bias[order])
    return head
