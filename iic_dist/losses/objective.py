"""What a head with clusters is trained towards."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """The part of the IIC loss that one can choose.

    Attributes:
        entropy_weight: w; 1 is mutual information alone.
        prior: (K,) relative sizes of the clusters to push towards; None for equal ones.
    """

    entropy_weight: float
    prior: Tensor | None = None
