"""Distributed training for Invariant Information Clustering with a contrastive head."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iic_dist.prediction.clusterer import Clusterer
    from iic_dist.prediction.estimator import IICClustering as IICClustering

__version__ = "0.1.0"


def load(run: str | os.PathLike[str], device: str = "auto") -> Clusterer:
    """Load a trained run for use; see `iic_dist.prediction.clusterer.load`."""
    from iic_dist.prediction import clusterer

    return clusterer.load(run, device)


def __getattr__(name: str) -> Any:
    """Hand on the estimator when it is asked for: the commands should not wait for scikit-learn."""
    if name == "IICClustering":
        from iic_dist.prediction.estimator import IICClustering

        return IICClustering
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
