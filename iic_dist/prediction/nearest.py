"""Which images are nearest to those on the gallery's page, and which further ones it shows for their sake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COUNT = 12
"""Nearest images that an image has."""

_BLOCK = 4096  # images whose cosines are computed at a time
_STEPS = 10**6  # in a cosine of 1; see `nearest`
_INDICES = 2**32


@dataclass(frozen=True)
class Surroundings:
    """The nearest images of each of the shown ones.

    Attributes:
        further: Images on the page beside the shown ones: nearest images that are not among these.
        nearest: For each shown image those of the page that are nearest to it, nearest first, and their cosines.
        exact: For each shown image how many of these, from the first, are the nearest of all images there are. Zero
            where the page had no room for further images, so that this was not looked for.
    """

    further: list[int]
    nearest: list[list[tuple[int, float]]]
    exact: list[int]


def surroundings(embeddings: Tensor, shown: Sequence[int], room: int) -> Surroundings:
    """Find the nearest images of those that are shown, and fill the room that is left with such as are not shown.

    First comes the nearest one of each shown image, then the second nearest of each, until the room is full.

    Args:
        embeddings: (M, F) of all images.
        shown: Those that are shown in any case, at most all.
        room: How many more the page can hold.
    """
    rows = torch.tensor(shown)
    everything = torch.arange(len(embeddings))
    if room <= 0 and len(shown) < len(embeddings):
        indices, cosines = nearest(embeddings, rows, rows.sort().values)
        return Surroundings([], _pairs(indices, cosines), [0] * len(shown))
    wanted, _ = nearest(embeddings, rows, everything)
    on_page = dict.fromkeys(shown)
    for index in wanted.T.flatten().tolist():
        if len(on_page) < len(shown) + room:
            on_page.setdefault(index)
    indices, cosines = nearest(embeddings, rows, torch.tensor(sorted(on_page)))
    exact = (indices == wanted[:, : indices.shape[1]]).long().cumprod(1).sum(1)
    return Surroundings(list(on_page)[len(shown) :], _pairs(indices, cosines), exact.tolist())


def nearest(embeddings: Tensor, rows: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Find the images whose features point in the most similar direction, once the mean of all is taken away.

    Cosines are computed in float64 and rounded to 1e-6, and of equal ones the lower index is nearer: the order depends
    neither on the number of threads nor on the blocks.

    Args:
        embeddings: (M, F) of all images.
        rows: (n,) int64, those whose nearest images are looked for.
        among: (m,) int64, those that are looked through; an image is not its own neighbour.

    Returns:
        (n, c) int64 indices in [0, M), nearest first, and (n, c) float64 cosines; c is `COUNT`, or less for lack of
        images.
    """
    mean = embeddings.mean(0, dtype=torch.float64)
    directions = _directions(embeddings[rows], mean)
    best = torch.empty(len(rows), 0, dtype=torch.int64)
    for block in among.split(_BLOCK):
        cosines = directions @ _directions(embeddings[block], mean).T
        # Cosine and index in one number, so that no two are equal and the largest are unique.
        keys = (cosines * _STEPS).round().long() * _INDICES - block
        keys[rows[:, None] == block] = torch.iinfo(torch.int64).min
        best = torch.cat((best, keys), 1)
        best = best.topk(min(COUNT, best.shape[1]), 1).values
    best = best[:, : len(among) - 1]  # the last one is the image itself where there are no more than COUNT
    indices = -best % _INDICES
    return indices, (best + indices).double() / (_INDICES * _STEPS)


def _directions(embeddings: Tensor, mean: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.double() - mean, dim=1)


def _pairs(indices: Tensor, cosines: Tensor) -> list[list[tuple[int, float]]]:
    return [list(zip(*row, strict=True)) for row in zip(indices.tolist(), cosines.tolist(), strict=True)]
