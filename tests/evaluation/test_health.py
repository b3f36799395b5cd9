"""Health of heads and the choice among several K: hand-worked cases."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from iic_dist.evaluation.health import Health, mean_agreement, recommend


def health(k: int, mean: float | None = 0.9, error: float | None = 0.02, **changes: Any) -> Health:
    values = {
        "head": f"clustering_{k}",
        "num_clusters": k,
        "information_share": 0.8,
        "entropy_share": 0.95,
        "used_clusters": k,
        "sizes": list(range(10 + k, 10, -1)),
        "confidence": 0.75,
        "agreement": mean,
        "agreement_error": error,
        "compared": 5,
    }
    return Health(**{**values, **changes})


def test_agreement_is_the_mean_of_all_pairs_with_its_jackknife_error() -> None:
    ari = np.array([[1, 0.9, 0.6], [0.9, 1, 0.3], [0.6, 0.3, 1]])
    mean, error = mean_agreement(ari)
    assert mean == pytest.approx(0.6)
    # Without one sub-head one pair is left: 0.3, 0.6, 0.9; sqrt(2 / 3 * (0.3^2 + 0 + 0.3^2)).
    assert error == pytest.approx(math.sqrt(0.12))


def test_agreement_of_too_few_sub_heads_is_unknown() -> None:
    assert mean_agreement(np.ones((1, 1))) == (None, None)
    assert mean_agreement(np.ones((0, 0))) == (None, None)
    assert mean_agreement(np.array([[1, 0.4], [0.4, 1]])) == (pytest.approx(0.4), None)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    """Where the ARI of two sub-heads is the sum of a term of each, the mean over pairs is 2 x the mean of the terms."""
    terms = np.random.default_rng(0).normal(size=7)
    ari = terms[:, None] + terms[None]
    mean, error = mean_agreement(ari)
    assert mean == pytest.approx(2 * terms.mean())
    assert error == pytest.approx(2 * terms.std(ddof=1) / math.sqrt(7))


@pytest.mark.parametrize(
    ("choices", "wanted", "says"),
    [
        ([health(5, 0.7), health(10, 0.95), health(20, 0.8)], 10, "agree best, ARI 0.950 ± 0.020"),
        ([health(10, 0.95, 0.04), health(12, 0.92, 0.01), health(20, 0.8)], 12, "those of K = 10 with 0.950 ± 0.040"),
        ([health(20, 0.949), health(5, 0.95, 0.001), health(8, 0.9)], 20, "K = 5"),
        ([health(5, 0.7), health(10, 0.99, used_clusters=4)], 5, "agree best"),
        ([health(5, 0.7, used_clusters=2), health(10, 0.9, used_clusters=4)], 10, "agree best"),
        ([health(5, 0.2, 0.0), health(10, -0.1, 0.0)], 5, "agree best"),
    ],
)
def test_the_largest_k_that_agrees_as_well_as_the_best_is_recommended(
    choices: list[Health], wanted: int, says: str
) -> None:
    recommendation = recommend(choices)
    assert recommendation.chosen.num_clusters == wanted
    assert says in recommendation.reason
    assert [each.num_clusters for each in recommendation.choices] == sorted(each.num_clusters for each in choices)
    assert recommend(choices[::-1]) == recommendation


@pytest.mark.parametrize(
    ("choices", "best"),
    [
        ([health(5, 0.0, 0.0), health(10, -0.1, 0.0)], 5),
        ([health(5, 0.01, 0.02), health(10, 0.02, 0.01), health(20, -0.01)], 10),
        ([health(5, 0.3, 0.2), health(10, 0.2, 0.1)], 5),
        ([health(5, 1.0, 0.0, used_clusters=1), health(10, 1.0, 0.0, used_clusters=1)], 5),  # collapsed, all of them
    ],
)
def test_where_no_agreement_differs_from_chance_nothing_is_recommended(choices: list[Health], best: int) -> None:
    """A K was recommended with an agreement of 0.01 ± 0.02."""
    recommendation = recommend(choices)
    assert not recommendation.found
    assert recommendation.chosen.num_clusters == best  # something must be used
    assert [each["recommended"] for each in recommendation.as_json()] == [False] * len(choices)
    assert recommendation.line().startswith(
        "nothing was found: no K is recommended: no agreement differs from chance; "
    )
    assert recommendation.line().endswith(f"of K = {best}; K = {best} is used until you choose another")
    assert recommend(choices[::-1]) == recommendation


@pytest.mark.parametrize("signal", [0.0, 0.5])
def test_sub_heads_of_chance_are_told_from_those_that_found_something(signal: float) -> None:
    """Of sub-heads by chance alone a K is recommended in few cases, of those that found something in all."""
    draw = np.random.default_rng(0)
    found = 0
    for _ in range(60):
        choices = []
        for k in (3, 5, 8):
            truth = draw.integers(0, k, 150)
            heads = [np.where(draw.random(150) < signal, truth, draw.integers(0, k, 150)) for _ in range(4)]
            ari = np.array([[adjusted_rand_score(one, other) for other in heads] for one in heads])
            choices.append(health(k, *mean_agreement(ari), compared=4))
        found += recommend(choices).found
    assert found == 60 if signal else found <= 5


def test_a_single_head_is_chosen_without_a_word() -> None:
    only = health(10, None, None)
    assert (recommend([only]).chosen, recommend([only]).reason) == (only, "")


def test_health_goes_through_json_and_says_its_numbers() -> None:
    exact = health(3, 0.123456, 0.01)
    written = json.loads(json.dumps(recommend([exact]).as_json()))
    assert written[0]["recommended"] is True
    assert Health.from_json(written[0]) == exact
    assert dataclasses.replace(exact, confidence=1 / 3).as_json()["confidence"] == 0.333333
    for part in ("information 0.800 ln K", "conditional 0.150", "3 of 3 clusters", "11 to 13 images", "0.123 ± 0.010"):
        assert part in exact.line()
    assert "agreement unknown" in health(3, None, None).line()
    numbers = exact.numbers()
    assert numbers["evaluation_clustering_3/smallest_cluster_share"] == pytest.approx(11 / 36)
    assert numbers["evaluation_clustering_3/largest_cluster_share"] == pytest.approx(13 / 36)
    assert "evaluation_clustering_3/agreement_ari" not in health(3, None, None).numbers()
