"""The space in which features are compared, and each image's neighbours in it; all ranks share the work."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from iic_dist import distributed
from iic_dist.models.feature_heads import FeatureSpace
from iic_dist.ops.nearest import BLOCK, nearest
from iic_dist.ops.philox import uniforms

DIMENSIONS = 256
"""Directions of largest variance that are kept."""

_ROWS = 8192  # features that are looked at together
_ROTATION = 2**31 + 1  # the "view" of the random numbers that turn the space; no image has so many views


def fit_space(features: Tensor, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> FeatureSpace:
    """Find the space of some features: centred, their leading principal directions, turned at random.

    The turn changes no distance. It matters because Adam steps along the axes: in the principal directions themselves,
    the heads follow the few that vary most (photographs: accuracy 0.69 instead of 0.95).

    Args:
        features: (N, F) on the CPU, in memory or mapped, floating point.
        seed: Of the run.
        device: Where to compute.
        dtype: Of the space.

    Collective: all ranks must call. Rank 0 finds it for all: sums over the ranks would round otherwise, and directions
    of nearly the same variance would turn with them.
    """
    return distributed.broadcast(_fit(features, seed, device, dtype).cpu() if distributed.rank() == 0 else None).to(
        device
    )


def _fit(features: Tensor, seed: int, device: torch.device, dtype: torch.dtype) -> FeatureSpace:
    count, width = features.shape
    mean = torch.zeros(width, dtype=torch.float64, device=device)
    scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
    for start in range(0, count, _ROWS):
        mean += features[start : start + _ROWS].to(device).double().sum(0) / count
    for start in range(0, count, _ROWS):
        centred = features[start : start + _ROWS].to(device).to(dtype) - mean.to(dtype)
        centred = torch.nn.functional.normalize(centred)
        scatter += centred.T @ centred
    directions = torch.linalg.eigh(scatter.cpu()).eigenvectors
    kept = min(width, DIMENSIONS, max(2, count - 1))
    projection = directions[:, -kept:] @ _turn(seed, kept)
    return FeatureSpace(mean.to(dtype), projection.to(dtype))


def _turn(seed: int, width: int) -> Tensor:
    """Draw a rotation, (width, width) float64, as the orthogonal part of a matrix of normal numbers."""
    u = uniforms(seed, 0, torch.arange(width * width), _ROTATION, 2).double()
    normal = (-2 * torch.log1p(-u[:, 0])).sqrt() * (2 * torch.pi * u[:, 1]).cos()  # Box and Muller
    q, r = torch.linalg.qr(normal.view(width, width))
    return q * r.diagonal().sign()


def map_features(features: Tensor, space: FeatureSpace, device: torch.device, budget_gib: float) -> Tensor:
    """Return the vectors (N, D) of all features: on the device, or, above the budget, mapped from a temporary file.

    Args:
        features: (N, F) on the CPU.
        space: Made of them, on the device.
        device: Where batches are computed.
        budget_gib: Memory that they may take on the device.
    """
    shape, dtype = (len(features), space.projection.shape[1]), space.projection.dtype
    if shape[0] * shape[1] * dtype.itemsize <= budget_gib * 2**30:
        vectors = torch.empty(shape, dtype=dtype, device=device)
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the mapping keeps it, and it is gone with the mapping
        numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
        vectors = torch.from_numpy(np.memmap(file, dtype=numpy_dtype, mode="w+", shape=shape))
    with torch.no_grad():
        for start in range(0, len(features), _ROWS):
            vectors[start : start + _ROWS] = space(features[start : start + _ROWS].to(device))
    return vectors


def find_neighbours(
    vectors: Tensor, k: int, device: torch.device, after_each: Callable[[int], None] | None = None
) -> Tensor:
    """Find the k nearest of each image by cosine, (N, k) int64 on the CPU, nearest first; each rank finds its rows.

    Blocks of rows are the same on any number of ranks, so that the same products decide.

    Args:
        vectors: (N, D) of one length, as `map_features` returns them.
        k: At most N - 1.
        device: Where to compute.
        after_each: Called with the number of rows after each block, equally often on all ranks.

    Collective: all ranks must call; gathers N * k integers.
    """
    count = len(vectors)
    blocks = -(-count // BLOCK)
    world_size, rank = distributed.world_size(), distributed.rank()
    bounds = [blocks * r // world_size for r in range(world_size + 1)]
    found = []
    for number in range(max(stop - start for start, stop in itertools.pairwise(bounds))):
        first = (bounds[rank] + number) * BLOCK
        if bounds[rank] + number < bounds[rank + 1]:
            block = vectors[first : first + BLOCK].to(device)
            found.append(nearest(block, first, vectors, k).cpu())
        if after_each is not None:
            after_each(BLOCK)
    sizes = [min(stop * BLOCK, count) - min(start * BLOCK, count) for start, stop in itertools.pairwise(bounds)]
    own = torch.cat(found) if found else torch.empty(0, k, dtype=torch.int64)
    return distributed.gather_rows(own.to(device), sizes).cpu()
