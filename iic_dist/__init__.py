"""Distributed training for Invariant Information Clustering with a contrastive head."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iic_dist.prediction.clusterer import Clusterer

__version__ = "0.1.0"


def load(run: str | os.PathLike[str], device: str = "auto") -> Clusterer:
    """Load a trained run for use; see `iic_dist.prediction.clusterer.load`."""
    from iic_dist.prediction import clusterer

    return clusterer.load(run, device)
