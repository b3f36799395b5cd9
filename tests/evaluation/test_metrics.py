"""Metrics against brute force over all matches, and against scikit-learn on the label vectors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, confusion_matrix, normalized_mutual_info_score

from iic_dist.evaluation.metrics import (
    accuracy,
    agreeing_share,
    ari,
    count_matrix,
    match_clusters,
    nmi,
    pair_counts,
    sub_head_agreement,
)

SHAPES = [(2, 2), (4, 4), (6, 6), (6, 3), (3, 6), (5, 1), (1, 5)]


def _labelled(num_clusters: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions (200, 2) that agree with the labels (200,) somewhat; some labels are -1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (200,), generator=generator)
    noise = torch.randint(0, num_clusters, (200, 2), generator=generator)
    agree = torch.rand(200, 2, generator=generator) < 0.5
    predictions = torch.where(agree, (labels[:, None] + 1) % num_clusters, noise)
    labels[::7] = -1
    return predictions, labels


def _best_share(counts: np.ndarray) -> float:
    """Try every one-to-one match of the smaller side into the larger."""
    table = counts if counts.shape[0] <= counts.shape[1] else counts.T
    small, large = table.shape
    matches = itertools.permutations(range(large), small)
    return max(sum(table[i, j] for i, j in enumerate(match)) for match in matches) / table.sum()


@pytest.mark.parametrize(("num_clusters", "num_classes"), SHAPES)
def test_count_matrix_equals_a_loop(num_clusters: int, num_classes: int) -> None:
    predictions, labels = _labelled(num_clusters, num_classes)
    expected = np.zeros((2, num_clusters, num_classes), dtype=np.int64)
    for row, label in zip(predictions.tolist(), labels.tolist(), strict=True):
        for h, k in enumerate(row):
            if label >= 0:
                expected[h, k, label] += 1
    counts = count_matrix(predictions, labels, num_clusters, num_classes)
    assert counts.dtype == torch.int64
    assert np.array_equal(counts.numpy(), expected)


def test_count_matrix_adds_up_over_shards() -> None:
    predictions, labels = _labelled(6, 4)
    parts = [count_matrix(predictions[s], labels[s], 6, 4) for s in (slice(0, 31), slice(31, 31), slice(31, None))]
    assert torch.equal(sum(parts), count_matrix(predictions, labels, 6, 4))


def test_count_matrix_does_not_wait_for_the_device() -> None:
    # A meta tensor has no values: whatever needs one on the host (item, nonzero, bincount, a mask) raises.
    predictions = torch.empty(9, 2, dtype=torch.int64, device="meta")
    labels = torch.empty(9, dtype=torch.int64, device="meta")
    assert count_matrix(predictions, labels, 3, 4).shape == (2, 3, 4)


@pytest.mark.parametrize(("num_clusters", "num_classes"), SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracy_equals_the_best_of_all_matches(num_clusters: int, num_classes: int, seed: int) -> None:
    predictions, labels = _labelled(num_clusters, num_classes, seed)
    for counts in count_matrix(predictions, labels, num_clusters, num_classes):
        assert accuracy(counts) == pytest.approx(_best_share(counts.numpy()), abs=1e-12)


@pytest.mark.parametrize(("num_clusters", "num_classes"), SHAPES)
def test_match_is_one_to_one_and_leaves_the_rest_out(num_clusters: int, num_classes: int) -> None:
    predictions, labels = _labelled(num_clusters, num_classes)
    counts = count_matrix(predictions, labels, num_clusters, num_classes)[0]
    matched = match_clusters(counts)
    used = matched[matched >= 0]
    assert matched.shape == (num_clusters,)
    assert len(used) == len(set(used)) == min(num_clusters, num_classes)
    assert (matched == -1).sum() == max(num_clusters - num_classes, 0)
    share = sum(int(counts[k, c]) for k, c in enumerate(matched) if c >= 0) / int(counts.sum())
    assert share == pytest.approx(accuracy(counts), abs=1e-12)


def test_match_by_hand() -> None:
    # Greedy would take 0 -> 0 (9) and be left with 1 -> 1 (1); together 8 + 7 is better.
    assert match_clusters(np.array([[9, 8], [7, 1]])).tolist() == [1, 0]
    assert match_clusters(np.array([[0, 5], [3, 0], [0, 4]])).tolist() == [1, 0, -1]


@pytest.mark.parametrize(("num_clusters", "num_classes"), SHAPES)
def test_nmi_and_ari_equal_scikit_learn_on_the_vectors(num_clusters: int, num_classes: int) -> None:
    predictions, labels = _labelled(num_clusters, num_classes)
    counted = labels >= 0
    for h, counts in enumerate(count_matrix(predictions, labels, num_clusters, num_classes)):
        clusters, classes = predictions[counted, h].numpy(), labels[counted].numpy()
        assert nmi(counts) == pytest.approx(normalized_mutual_info_score(classes, clusters), abs=1e-12)
        assert ari(counts) == pytest.approx(adjusted_rand_score(classes, clusters), abs=1e-12)


def test_known_values() -> None:
    relabelled = np.array([[0, 0, 4], [7, 0, 0], [0, 5, 0]])
    assert (accuracy(relabelled), nmi(relabelled), ari(relabelled)) == pytest.approx((1, 1, 1))
    independent = np.full((3, 3), 20)
    assert accuracy(independent) == pytest.approx(1 / 3)
    assert nmi(independent) == pytest.approx(0, abs=1e-12)
    # (I - E) / (max - E) over pairs: I = 9 C(20, 2), E = (3 C(60, 2))^2 / C(180, 2), max = 3 C(60, 2)
    same, expected, most = 9 * 190, (3 * 1770) ** 2 / 16110, 3 * 1770
    assert ari(independent) == pytest.approx((same - expected) / (most - expected))


def test_nothing_counted_is_nan() -> None:
    labels = torch.full((5,), -1)
    counts = count_matrix(torch.zeros(5, 1, dtype=torch.int64), labels, 3, 4)[0]
    assert not counts.any()
    assert math.isnan(accuracy(counts))
    assert math.isnan(nmi(counts))
    assert math.isnan(ari(counts))


def test_agreement_after_matching_is_that_of_scipy_by_hand() -> None:
    generator = np.random.default_rng(0)
    selected = generator.integers(0, 4, 300)
    others = [np.where(generator.random(300) < noise, generator.integers(0, 4, 300), selected) for noise in (0.1, 0.6)]
    renamed = [generator.permutation(4)[other] for other in others]
    clusters = torch.from_numpy(np.stack([renamed[0], selected, renamed[1]], axis=1))
    expected = np.zeros(300)
    for other in renamed:
        table = confusion_matrix(other, selected)
        rows, columns = linear_sum_assignment(-table)
        expected += (columns[np.argsort(rows)][other] == selected) / 2
    assert agreeing_share(clusters, 1, 4).tolist() == expected.tolist()
    assert 0.5 < expected.mean() < 0.95


def test_agreement_of_one_sub_head_is_unknown() -> None:
    """It was said to be 1.000."""
    assert agreeing_share(torch.tensor([[0], [2]]), 0, 3).isnan().tolist() == [True, True]


def test_sub_heads_are_compared_as_scikit_learn_compares_them() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (300, 1), generator=generator)
    noise = torch.randint(0, 5, (300, 4), generator=generator)
    clusters = torch.where(torch.rand(300, 4, generator=generator) < 0.7, truth, noise)
    clusters[:, 3] = (clusters[:, 1] + 2) % 5  # the same clusters under other numbers
    parts = [pair_counts(part, 5) for part in clusters.split([100, 0, 200])]
    matrix = sub_head_agreement(sum(parts), 4)
    for a, b in itertools.product(range(4), repeat=2):
        expected = adjusted_rand_score(clusters[:, a].numpy(), clusters[:, b].numpy())
        assert matrix[a, b] == pytest.approx(expected, abs=1e-12)
    assert matrix[1, 3] == 1
    assert sub_head_agreement(pair_counts(clusters[:, :1], 5), 1).tolist() == [[1]]


def test_ari_of_many_images_does_not_overflow() -> None:
    counts = np.full((2, 2), 10**8)
    counts[0, 0] += 10**8
    expected = ari(counts // 10**4)
    assert ari(counts) == pytest.approx(expected, rel=1e-2)
