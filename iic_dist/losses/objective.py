"""What a head with clusters is trained towards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from iic_dist.errors import UsageError


@dataclass(frozen=True)
class Objective:
    """The part of the IIC loss that one can choose.

    Attributes:
        entropy_weight: w; 1 is mutual information alone.
        prior: (K,) relative sizes of the clusters to push towards; None for equal ones.
    """

    entropy_weight: float
    prior: Tensor | None = None


def read_sizes(path: str) -> list[float]:
    """Read relative cluster sizes, one a line.

    Raises:
        UsageError: no such file, or a line that is not a number above 0.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not text, or a path with a NUL
        raise UsageError(
            f"loss.prior={path!r}: must be uniform, free, or a file of sizes, one a line ({error})"
        ) from error
    sizes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            sizes.append(float(line))
        except ValueError:
            sizes.append(math.nan)
        if not (0 < sizes[-1] < math.inf):
            raise UsageError(f"loss.prior={path!r}: line {number} is {line[:40]!r}, but must be a number above 0")
    return sizes
