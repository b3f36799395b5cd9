"""The exact nearest rows, against scikit-learn and against a full stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from iic_dist.ops import nearest as module
from iic_dist.ops.nearest import nearest


def unit_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows)


@pytest.mark.parametrize(("n", "d", "k"), [(2, 3, 1), (50, 2, 49), (301, 17, 20), (1000, 5, 7)])
def test_the_neighbours_are_those_of_scikit_learn(n: int, d: int, k: int) -> None:
    base = unit_rows(n, d)
    found = torch.cat([nearest(base[i : i + 100], i, base, k) for i in range(0, n, 100)])
    wanted = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(base.numpy()).kneighbors()[1]
    np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("chunk", [3, 4, 1000])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_of_equal_scores_the_lower_index_is_nearer(k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """topk returns any of several equal scores."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    base = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0], [0, 1], [0, 1]])
    found = nearest(base[3:], 3, base, k)
    scores = base[3:] @ base.T
    for row, index in enumerate(range(3, 10)):
        scores[row, index] = -torch.inf
    assert torch.equal(found, scores.sort(dim=1, descending=True, stable=True).indices[:, :k])


def test_a_duplicate_is_a_neighbour_and_the_row_itself_is_none() -> None:
    base = torch.cat([unit_rows(20, 4), unit_rows(20, 4)])
    found = nearest(base, 0, base, 3)
    assert torch.equal(found[:, 0], (torch.arange(40) + 20) % 40)
    assert not (found == torch.arange(40).unsqueeze(1)).any()
