"""The nearest rows of a matrix by their inner product, exact, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024
"""Rows that are compared with all others at a time."""

_CHUNK = 16384  # others that they are compared with at a time: BLOCK x _CHUNK scores, 64 MB in float32


def nearest(rows: Tensor, first: int, base: Tensor, k: int) -> Tensor:
    """Find for each row the k rows of `base` with the largest inner product, the row itself left out.

    Equals `(rows @ base.T).fill_own(-inf).sort(descending=True, stable=True).indices[:, :k]`: of equal scores the
    lower index counts as nearer. A duplicate is another row, and the nearest one.

    Args:
        rows: (n, D) floating point, rows first to first + n - 1 of `base`; n * 16384 scores are held.
        first: Index in `base` of the first row.
        base: (N, D), same dtype; may lie elsewhere, such as mapped from a file.
        k: From 1 to N - 1.

    Returns:
        (n, k) int64 on the device of `rows`, nearest first.
    """
    assert 1 <= k < len(base), f"k={k} of {len(base)} rows"
    values = torch.empty(len(rows), 0, dtype=rows.dtype, device=rows.device)
    indices = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for start in range(0, len(base), _CHUNK):
        chunk = base[start : start + _CHUNK].to(rows.device)
        scores = rows @ chunk.T
        own = torch.arange(first, first + len(rows), device=rows.device) - start
        inside = (own >= 0) & (own < len(chunk))
        scores[inside, own[inside]] = -torch.inf
        found = _largest(scores, min(k, len(chunk)))
        # What was found before has the lower indices, and a stable sort keeps it in front of its equals.
        values = torch.cat([values, scores.gather(1, found)], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        indices = torch.cat([indices, found + start], 1).gather(1, order)[:, :k]
        values = values[:, :k]
    return indices


def _largest(scores: Tensor, k: int) -> Tensor:
    """Return where the k largest of each row are, largest first, of equal ones the lower index first."""
    values, indices = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    # topk takes any of the scores that equal the last one: where there are more of them, the lower indices count.
    tied = torch.nonzero(values[:, k:] == values[:, k - 1 : k])[:, 0]
    values, indices = values[:, :k].contiguous(), indices[:, :k]
    if len(tied):
        ordered = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], indices[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    indices, order = indices.sort(dim=1)
    order = values.gather(1, order).sort(dim=1, descending=True, stable=True).indices
    return indices.gather(1, order)
