"""The space in which features are compared, and each image's neighbours in it; all ranks share the work."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from iic_dist import distributed
from iic_dist.errors import UsageError
from iic_dist.models.feature_heads import SCALE, FeatureSpace
from iic_dist.ops.nearest import BLOCK, nearest
from iic_dist.ops.philox import uniforms

DIMENSIONS = 128
"""Directions of largest variance that are kept."""

NEAREST = 10
"""Neighbours of each image that the space is made for."""

POWER = 2.0
"""Of the correlations, by which directions shrink."""

RIDGE = 1e-2
"""Share of the mean variance that is added to all variances before anything is divided by them."""

_ROWS = 8192  # features that are looked at together
_ROTATION = 2**31 + 1  # the "view" of the random numbers that turn the space; no image has so many views


def fit_space(
    features: Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    after_each: Callable[[int], None] | None = None,
    whitening: float = 0.0,
) -> FeatureSpace:
    """Find the space in which images are most like their neighbours.

    Canonical correlations of an image's direction y (centred, of length 1, in the leading principal directions V) with
    those of its nearest images: with C = E[y y^T] over both ends of such pairs, S = E[y y'^T] symmetric over pairs, and
    C^-1/2 S C^-1/2 = Q L Q^T, the projection is

        P = V C^-1/2 Q max(L, 0)^2 R

    What neighbours share stays, other directions shrink; how much a direction varies does not count. R is a rotation
    that changes no distance. It matters because Adam steps along the axes: in the principal directions themselves the
    heads follow the few that vary most (photographs: accuracy 0.69 instead of 0.95).

    Before that, features may be whitened in part: A = U (L + ridge)^(-whitening / 2) U^T of their covariance U L U^T,
    so that not the few directions in which a trained network varies most decide what is near.

    Args:
        features: (N, F) on the CPU, in memory or mapped, floating point.
        device: Where to compute.
        dtype: Of the space.
        after_each: Called with a number of images after each block of neighbours, equally often on all ranks.
        whitening: Power of the standard deviations that features are divided by: 0 leaves them, 1 whitens.

    Raises:
        UsageError: a feature is not finite, or none differs.

    Collective: all ranks must call. Rank 0 finds it for all, but for the neighbours: sums over the ranks would round
    otherwise, and directions of nearly the same variance would turn with them.
    """
    count, width = features.shape
    mean = torch.zeros(width, dtype=torch.float64, device=device)
    for start in range(0, count, _ROWS):
        mean += features[start : start + _ROWS].to(device).double().sum(0) / count
    if not mean.isfinite().all():
        raise UsageError(f"the features of {count} images hold numbers that are not finite: look at what made them")
    metric = _whitening(features, mean, whitening, dtype) if whitening else None
    plain = FeatureSpace(
        mean.to(dtype), torch.eye(width, dtype=dtype, device=device), torch.zeros_like(mean, dtype=dtype), metric
    )
    directions = map_features(features, plain, device)
    if not any(bool((part != directions[0]).any()) for part in directions.split(_ROWS)):
        raise UsageError(f"the features of {count} images are all the same, or too large: look at what made them")
    # Of few images at most half of the others: what an image shares with all others is less than nothing.
    near = find_neighbours(directions, min(NEAREST, max(1, (count - 1) // 2)), device, after_each)
    found = distributed.broadcast(_fit(features, plain, near).cpu() if distributed.rank() == 0 else None)
    assert found is not None
    return found.to(device)


def _whitening(features: Tensor, mean: Tensor, power: float, dtype: torch.dtype) -> Tensor:
    """Find the matrix (F, F) that whitens features in part; rank 0 finds it for all, on their `mean`'s device."""
    found = None
    if distributed.rank() == 0:
        covariance = torch.zeros(2 * mean.shape, dtype=torch.float64, device=mean.device)
        for start in range(0, len(features), _ROWS):
            part = features[start : start + _ROWS].to(mean.device).double() - mean
            covariance += part.T @ part / len(features)
        variance, axes = torch.linalg.eigh(covariance.cpu())
        variance = variance.clamp_min(0) + (RIDGE * variance.mean() or 1.0)  # features that are all the same have none
        found = (axes * (variance / variance.mean()) ** (-power / 2) @ axes.T).to(dtype)
    found = distributed.broadcast(found)
    assert found is not None
    return found.to(mean.device)


def _fit(features: Tensor, plain: FeatureSpace, near: Tensor) -> FeatureSpace:
    """Find the projection, given the directions of the features and each image's neighbours."""
    device, dtype = plain.mean.device, plain.mean.dtype
    count, width = features.shape
    kept = min(width, DIMENSIONS)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, count, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, count))
            yield rows, plain(features[rows].to(device)).double() / SCALE

    middle = sum((part.sum(0) for _, part in batches()), torch.zeros(width, dtype=torch.float64, device=device)) / count
    scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
    for _, part in batches():
        scatter += (part - middle).T @ (part - middle) / count
    principal = torch.linalg.eigh(scatter.cpu()).eigenvectors[:, -kept:].to(device)
    directions = torch.cat([(part - middle) @ principal for _, part in batches()])  # (N, D) float64
    weight = (1 + torch.bincount(near.flatten(), minlength=count).double().to(device) / near.shape[1]) / 2
    own = (directions * weight.unsqueeze(1)).T @ directions / count
    shared = torch.zeros_like(own)
    for start in range(0, count, _ROWS):
        partners = directions[near[start : start + _ROWS].to(device)].mean(1)
        shared += directions[start : start + _ROWS].T @ partners / count
    own += RIDGE * own.trace() / kept * torch.eye(kept, dtype=own.dtype, device=device)
    scale, axes = torch.linalg.eigh(own.cpu())
    whiten = axes * scale.rsqrt()
    shared = whiten.T @ (shared + shared.T).cpu() / 2 @ whiten
    correlation, canonical = torch.linalg.eigh(shared)
    share = correlation.clamp_min(0) ** POWER
    if not share.any():  # neighbours have nothing in common: no direction counts more than another
        share = torch.ones_like(share)
    projection = principal.cpu() @ whiten @ (canonical * share) @ _turn(kept)
    shift = middle.cpu() @ projection
    whitening = None if plain.whitening is None else plain.whitening.cpu()
    return FeatureSpace(plain.mean.cpu(), projection.to(dtype), shift.to(dtype), whitening)


def _turn(width: int) -> Tensor:
    """Draw a rotation, (width, width) float64, as the orthogonal part of a matrix of normal numbers."""
    u = uniforms(0, 0, torch.arange(width * width), _ROTATION, 2).double()
    normal = (-2 * torch.log1p(-u[:, 0])).sqrt() * (2 * torch.pi * u[:, 1]).cos()  # Box and Muller
    q, r = torch.linalg.qr(normal.view(width, width))
    return q * r.diagonal().sign()


def map_features(features: Tensor, space: FeatureSpace, device: torch.device, budget_gib: float = 1.0) -> Tensor:
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
