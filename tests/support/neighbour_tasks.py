"""What the tests of the second stage run on several ranks, and the features that they run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor
from torch.nn import functional

from iic_dist.losses.objective import Objective
from iic_dist.training import feature_space, neighbours
from iic_dist.training.feature_space import find_neighbours, fit_space
from iic_dist.training.head_plan import HeadTraining
from iic_dist.training.neighbours import NeighbourTraining
from iic_dist.training.starts import ClusterStarts

CPU = torch.device("cpu")
PRIOR = torch.tensor([1.0, 2, 2, 3], dtype=torch.float64)
OBJECTIVES = {"clustering": Objective(2.0, PRIOR), "clustering_6": Objective(1.5)}
SHAPES = {"clustering": (3, 4), "clustering_6": (2, 6)}


def blobs(n: int, d: int, kinds: int = 5, noise: float = 0.6, seed: int = 0) -> Tensor:
    """(N, D) float64 around some centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, d, generator=generator, dtype=torch.float64)
    return centres[torch.arange(n) % kinds] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)


def unit_rows(n: int, d: int) -> Tensor:
    """(N, D) float64, of length 5 as the heads see them."""
    return 5 * functional.normalize(blobs(n, d))


def on(world_size: int, pools: dict[int, Ranks], function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what a function gives on each rank of a default group of that size."""
    if world_size == 1:
        return [function(0, None, *arguments)]
    return pools[world_size].run(world_size, function, *arguments)


def neighbours_of(rank: int, group: dist.ProcessGroup | None, vectors: Tensor, k: int, block: int) -> Tensor:
    """Find neighbours in blocks of few rows."""
    before, feature_space.BLOCK = feature_space.BLOCK, block
    try:
        return find_neighbours(vectors, k, CPU)
    finally:
        feature_space.BLOCK = before


def space_of(rank: int, group: dist.ProcessGroup | None, features: Tensor) -> list[Tensor]:
    """Fit a space that is whitened in part; return its four tensors."""
    space = fit_space(features, CPU, torch.float64, whitening=0.75)
    assert space.whitening is not None
    return [space.mean.data, space.projection.data, space.shift.data, space.whitening.data]


def why_no_space(rank: int, group: dist.ProcessGroup | None, features: Tensor, whitening: float) -> str:
    """Return the error of features that have no space."""
    try:
        fit_space(features, CPU, whitening=whitening)
    except ValueError as error:
        return str(error)
    return "no error"


def settings(**changes: Any) -> HeadTraining:
    asked = {"steps": 20, "partners": 2, "walk": 3, "batch_size": 30, "lr": 5e-3, "weight_decay": 1e-2}
    asked |= {"seed": 3, "impl": "torch"}
    return HeadTraining(**(asked | changes))


def training(vectors: Tensor, near: Tensor, **changes: Any) -> NeighbourTraining:
    starts = ClusterStarts(vectors, near, 3)
    return NeighbourTraining(vectors, near, SHAPES, OBJECTIVES, settings(**changes), CPU, starts)


def trained(
    rank: int, group: dist.ProcessGroup | None, vectors: Tensor, near: Tensor, changes: dict[str, Any]
) -> dict[str, Any]:
    """Train heads to the end; return the images of each step, losses, weights, and the verdict in small parts."""
    heads = training(vectors, near, **changes)
    images, losses = [], []
    while heads.step < heads.settings.steps:
        images.append(heads._batch())
        losses.append(torch.cat([terms.loss for terms in heads.train_step().values()]))
    before, neighbours._ROWS = neighbours._ROWS, 16
    try:
        judged = heads.judge()
    finally:
        neighbours._ROWS = before
    return {
        "images": images,
        "losses": torch.cat(losses),
        "weights": torch.cat([value.detach().flatten() for value in heads.parameters]),
        "judged": {name: (terms.loss, terms.joint) for name, terms in judged.items()},
    }


def started(rank: int, group: dist.ProcessGroup | None, vectors: Tensor, near: Tensor) -> Tensor:
    """Return where heads of four clusters start."""
    return ClusterStarts(vectors, near, 3)(4, 6)


def why_no_training(rank: int, group: dist.ProcessGroup | None, count: int) -> str:
    """Return the error of so many images."""
    try:
        training(unit_rows(count, 3), torch.zeros(count, 1, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return "no error"
