"""Random Fourier features: rows in whose inner products distances count."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

FREQUENCIES = 128
"""Random waves; each gives a sine and a cosine."""

WIDTH = 0.5
"""Width of the Gaussian, as a share of the median distance of two rows."""

_ROWS = 2000  # rows whose distances are looked at


class FourierFeatures(nn.Module):
    """Maps rows x to (sin(x W), cos(x W)), whose inner products are close to those of a Gaussian kernel.

    Args:
        frequencies: (F, D), W.

    Source: Rahimi and Recht, "Random features for large-scale kernel machines", NIPS 2007.
    """

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(frequencies, requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Return (B, 2 D) of `rows` (B, F)."""
        phases = rows @ self.frequencies
        return torch.cat([phases.sin(), phases.cos()], 1)


def draw_frequencies(rows: Tensor, seed: int) -> Tensor:
    """Draw the frequencies (F, 128) of a Gaussian of half the median distance of two different rows.

    Args:
        rows: (N, F) on the CPU; above 2000 the distances of 2000 of them, drawn, are looked at.
        seed: Decides what is drawn, in [0, 2^32).
    """
    random = np.random.RandomState(seed)
    some = rows[torch.from_numpy(random.permutation(len(rows))[:_ROWS])]
    distances = torch.pdist(some)
    distances = distances[distances > 0]
    width = WIDTH * float(distances.median()) if len(distances) else 1.0
    normal = torch.from_numpy(random.standard_normal((rows.shape[1], FREQUENCIES)))
    return (normal / width).to(rows.dtype)
