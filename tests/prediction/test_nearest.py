"""The nearest images of those on the page: against a full sort in another library, and what fills the page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from iic_dist.prediction import nearest as module
from iic_dist.prediction.nearest import COUNT, nearest, surroundings


def oracle(embeddings: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """All cosines of the centred features, to six digits, and each image's others in order, the lower index first."""
    centred = embeddings.double().numpy() - embeddings.double().numpy().mean(0)
    cosines = np.round(1 - cdist(centred, centred, "cosine"), 6)
    np.fill_diagonal(cosines, -2)
    return cosines, np.argsort(-cosines, axis=1, kind="stable")[:, :-1]


def random(count: int, features: int = 6) -> torch.Tensor:
    """Features that are far from centred."""
    return 5 + torch.randn(count, features, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("block", [7, 4096])
def test_nearest_is_the_head_of_a_full_sort(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    embeddings = random(60)
    embeddings[20:30] = embeddings[10:20]  # images that are there twice: equal cosines
    cosines, order = oracle(embeddings)
    rows = torch.tensor([3, 10, 25, 59])
    found, values = nearest(embeddings, rows, torch.arange(60))
    assert found.tolist() == order[rows.numpy(), :COUNT].tolist()
    assert np.allclose(values.numpy(), np.take_along_axis(cosines[rows.numpy()], found.numpy(), 1), atol=1.5e-6)
    assert found[1, 0] == 20  # the twin


@pytest.mark.parametrize("count", [1, 2, 5, COUNT, COUNT + 1])
def test_few_images(count: int) -> None:
    embeddings = random(count)
    found, values = nearest(embeddings, torch.arange(count), torch.arange(count))
    assert found.shape == values.shape == (count, min(COUNT, count - 1))
    assert found.tolist() == oracle(embeddings)[1][:, :COUNT].tolist()


def test_features_without_direction_have_neighbours_all_the_same() -> None:
    found, values = nearest(torch.ones(20, 4), torch.tensor([0, 5]), torch.arange(20))
    assert found.tolist() == [list(range(1, 13)), [0, 1, 2, 3, 4, *range(6, 13)]]
    assert not values.any()


def test_threads_and_ranks_do_not_change_the_order() -> None:
    embeddings, rows = random(3000, 64), torch.arange(0, 3000, 10)
    embeddings[1500:] = embeddings[:1500]
    threads, found = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append(nearest(embeddings, rows, torch.arange(3000)))
    torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_room_for_all() -> None:
    embeddings = random(200)
    _, order = oracle(embeddings)
    shown = [150, 3, 77]
    around = surroundings(embeddings, shown, 1000)
    assert [[image for image, _ in row] for row in around.nearest] == order[shown, :COUNT].tolist()
    assert around.exact == [COUNT] * 3
    assert not set(around.further) & set(shown)
    assert set(around.further) | set(shown) >= set(order[shown, :COUNT].flatten())


def test_room_for_some() -> None:
    """The nearest one of each shown image comes before the second nearest of any."""
    embeddings = random(200)
    _, order = oracle(embeddings)
    shown = [150, 3, 77, 12]
    around = surroundings(embeddings, shown, 6)
    wanted = [image for image in dict.fromkeys(order[shown].T.flatten().tolist()) if image not in shown][:6]
    assert around.further == wanted
    page = set(shown) | set(wanted)
    for image, row, exact in zip(shown, around.nearest, around.exact, strict=True):
        assert [other for other, _ in row] == [other for other in order[image] if other in page][:COUNT]
        assert exact == next(i for i, other in enumerate(order[image]) if other not in page)
        assert exact >= 1


@pytest.mark.parametrize("room", [0, -800])
def test_no_room(room: int) -> None:
    embeddings = random(200)
    _, order = oracle(embeddings)
    shown = list(range(199, 100, -2))
    around = surroundings(embeddings, shown, room)
    assert (around.further, around.exact) == ([], [0] * 50)
    for image, row in zip(shown, around.nearest, strict=True):
        assert [other for other, _ in row] == [other for other in order[image] if other in shown][:COUNT]


def test_a_page_that_shows_all_images_says_that_its_neighbours_are_exact() -> None:
    around = surroundings(random(20), list(range(20)), 0)
    assert around.exact == [COUNT] * 20
