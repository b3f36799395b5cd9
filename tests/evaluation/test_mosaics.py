"""Pictures of views and clusters, checked by finding tiles of known colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from iic_dist.evaluation.mosaics import cluster_mosaic, view_pairs


def _coloured(count: int, size: int = 8, red: int = 255) -> torch.Tensor:
    """Return uint8 images (count, 3, size, size), each of one colour that no text has: (red, index, 0)."""
    colours = torch.tensor([[red, index, 0] for index in range(count)], dtype=torch.uint8)
    return colours[:, :, None, None].expand(-1, -1, size, size).clone()


def _tile(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Return top, left, height and width of the rectangle of `colour`, None where there is none."""
    ys, xs = np.nonzero((picture == np.array(colour)).all(axis=-1))
    if len(ys) == 0:
        return None
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    assert height * width == len(ys)
    return int(ys.min()), int(xs.min()), int(height), int(width)


def _place(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int]:
    """Return row and column in pixels of the middle of the tile of `colour`."""
    tile = _tile(picture, colour)
    assert tile is not None, colour
    top, left, height, width = tile
    return top + height // 2, left + width // 2


def test_view_pairs_puts_each_image_beside_its_views() -> None:
    originals, first = _coloured(5), _coloured(5, red=250) / 255
    second = torch.cat([_coloured(5, red=245), _coloured(5, red=240)]) / 255  # two repeats, repeat-major
    picture = view_pairs(first, second, originals, mean=(0, 0, 0), std=(1, 1, 1))
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    for index in range(5):
        places = [_place(picture, (red, index, 0)) for red in (255, 250, 245, 240)]
        assert len({row for row, _ in places}) == 1
        columns = [column for _, column in places]
        assert columns == sorted(set(columns))


def test_view_pairs_scales_small_images_to_whole_blocks_and_stops_at_num_images() -> None:
    views = _coloured(6) / 255
    picture = view_pairs(views, views / 2, mean=(0, 0, 0), std=(1, 1, 1), num_images=4)
    assert _tile(picture, (255, 3, 0))[2:] == (48, 48)
    assert _tile(picture, (255, 4, 0)) is None


def test_view_pairs_keeps_rows_together_when_sizes_differ() -> None:
    originals, views = _coloured(6, size=96), _coloured(6, size=64, red=250) / 255
    picture = view_pairs(views, views, originals, mean=(0, 0, 0), std=(1, 1, 1))
    for index in range(6):
        ys, _ = np.nonzero((picture == (250, index, 0)).all(axis=-1))
        assert (ys.min() + ys.max() + 1) // 2 == _place(picture, (255, index, 0))[0]


def test_view_pairs_undoes_the_normalisation() -> None:
    mean, std = (0.4, 0.1, 0.2), (0.5, 0.25, 2.0)
    colour = torch.tensor([200, 100, 50]).view(1, 3, 1, 1) / 255
    view = ((colour - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).expand(1, 3, 8, 8)
    picture = view_pairs(view, -view, mean=mean, std=std)
    assert _tile(picture, (200, 100, 50)) is not None


def test_view_pairs_stretches_gray_views_without_mean_and_std() -> None:
    view = torch.linspace(-3, 5, 64).view(1, 1, 8, 8)
    picture = view_pairs(view, view)
    assert (picture == 0).all(axis=-1).sum() >= 2 * 36  # one pixel of 6 x 6 in either view
    assert (picture == 255).all(axis=-1).sum() >= 2 * 36


def test_view_pairs_shows_the_sign_of_sobel_maps() -> None:
    view = torch.zeros(1, 2, 8, 8)
    view[0, 0, :, :4] = 2.0  # the horizontal map positive at the left
    view[0, 1, :4] = -2.0  # the vertical map negative at the top
    picture = view_pairs(view, torch.zeros_like(view))
    red, blue = _tile(picture, (178, 24, 43)), _tile(picture, (33, 102, 172))
    assert red[2:] == (48, 24)
    assert blue[2:] == (24, 48)
    assert red[1] < blue[1]
    assert red[0] == blue[0]
    assert (picture == 255).all(axis=-1).sum() >= 48 * 48 * 3  # zero is white: two halves and the other view


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_view_pairs_takes_every_kind_of_view(channels: int, dtype: torch.dtype) -> None:
    views = torch.randn(3, channels, 12, 12).to(dtype)
    assert view_pairs(views, torch.cat([views, views])).dtype == np.uint8
    assert view_pairs(views[:1], views[:1]).dtype == np.uint8


@pytest.mark.parametrize("doubtful", [False, True])
def test_mosaic_rows_hold_the_most_or_least_confident_images_in_order(doubtful: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(60, 4, generator=generator)
    probabilities[:, 2] = 0  # an empty cluster
    probabilities[:, 3] = 0
    probabilities[17, 3] = 2  # a cluster of one image
    clusters, confidence = probabilities.argmax(1), probabilities.amax(1)
    picture = cluster_mosaic(_coloured(60), clusters, confidence, 4, per_cluster=5, doubtful=doubtful)
    drawn = set()
    rows = []
    for k in range(4):
        members = [i for i in range(60) if max(range(4), key=lambda j: probabilities[i, j]) == k]
        members = sorted(members, key=lambda i: float(probabilities[i, k]), reverse=not doubtful)[:5]
        places = [_place(picture, (255, i, 0)) for i in members]
        columns = [column for _, column in places]
        assert columns == sorted(set(columns))
        assert len({row for row, _ in places}) == (1 if members else 0)
        rows += [places[0][0]] if members else []
        drawn |= set(members)
    assert rows == sorted(set(rows))
    assert len(drawn) == 5 + 5 + 0 + 1
    for i in set(range(60)) - drawn:
        assert _tile(picture, (255, i, 0)) is None


def test_mosaic_of_many_clusters_is_not_a_tower() -> None:
    picture = cluster_mosaic(_coloured(100, size=32), torch.arange(100) % 70, torch.rand(100), 70, per_cluster=4)
    assert picture.shape[0] < 20 * 64 + 100


def test_mosaic_takes_gray_images_fewer_than_asked_for() -> None:
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    picture = cluster_mosaic(images, torch.arange(3), torch.ones(3), 3, per_cluster=12)
    assert picture.dtype == np.uint8
    assert picture.shape[0] >= 3 * 56
