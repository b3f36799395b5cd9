"""How well a head with clusters does, in numbers that need no label, and which of several K to take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iic_dist.wording import counted

_FROM_CHANCE = 2.0  # standard errors


@dataclass(frozen=True)
class Health:
    """What can be said of the selected sub-head of a head without labels.

    Attributes:
        head: Its name.
        num_clusters: K.
        information_share: Mutual information of the views over the last pass of the training, as a share of ln K:
            1 where the views of an image always agree and all clusters are of one size.
        entropy_share: Entropy of the cluster sizes, likewise; the difference to `information_share` is the conditional
            entropy, what the views disagree about.
        used_clusters: Clusters with more than 0.1 / K of the images.
        sizes: Of each cluster the number of images, largest first.
        confidence: Mean probability of the likeliest cluster, in [1 / K, 1].
        agreement: Mean ARI of each two sub-heads that started independently; None where there are not two.
        agreement_error: Its standard error, by the jackknife over sub-heads; None where there are not three.
        compared: Number of these sub-heads.
    """

    head: str
    num_clusters: int
    information_share: float
    entropy_share: float
    used_clusters: int
    sizes: list[int]
    confidence: float
    agreement: float | None
    agreement_error: float | None
    compared: int

    def numbers(self) -> dict[str, float]:
        """Return what TensorBoard draws over time."""
        total = sum(self.sizes)
        numbers = {
            "used_clusters": self.used_clusters,
            "smallest_cluster_share": self.sizes[-1] / total,
            "largest_cluster_share": self.sizes[0] / total,
            "confidence": self.confidence,
        }
        if self.agreement is not None:
            numbers["agreement_ari"] = self.agreement
        return {f"evaluation_{self.head}/{name}": value for name, value in numbers.items()}

    def as_json(self) -> dict[str, Any]:
        """Return all attributes, rounded to what is worth reading."""
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Health:
        """Read what `as_json` wrote; other entries are passed over."""
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})

    @property
    def measured(self) -> tuple[float, float]:
        """The agreement and its error, of a head that has both."""
        assert self.agreement is not None
        assert self.agreement_error is not None, "three sub-heads were compared"
        return self.agreement, self.agreement_error

    def agreement_text(self) -> str:
        """Write the agreement with its error, as far as they are known."""
        if self.agreement is None:
            return "unknown"
        return f"{self.agreement:.3f}" + ("" if self.agreement_error is None else f" ± {self.agreement_error:.3f}")

    def line(self) -> str:
        """Say it in one line."""
        return (
            f"{self.head}: information {self.information_share:.3f} ln K (entropy {self.entropy_share:.3f}, "
            f"conditional {self.entropy_share - self.information_share:.3f}), {self.used_clusters} of "
            f"{self.num_clusters} clusters used, of {self.sizes[-1]:,} to {self.sizes[0]:,} images, confidence "
            f"{self.confidence:.3f}, agreement {self.agreement_text()} of {counted(self.compared, 'sub-head')}"
        )


def mean_agreement(ari: np.ndarray) -> tuple[float | None, float | None]:
    """Average the ARI over each two sub-heads.

    Args:
        ari: (n, n), of each two.

    Returns:
        The mean, None for fewer than two; its standard error by the jackknife, None for fewer than three: from the
        means m_i without sub-head i, sqrt((n - 1) / n sum_i (m_i - mean of all m)^2).
    """
    n = len(ari)
    if n < 2:
        return None, None
    if n < 3:
        return _mean_of_pairs(ari), None
    without = np.array([_mean_of_pairs(np.delete(np.delete(ari, i, 0), i, 1)) for i in range(n)])
    return _mean_of_pairs(ari), math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))


def _mean_of_pairs(matrix: np.ndarray) -> float:
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())


@dataclass(frozen=True)
class Recommendation:
    """Which of several clustering heads to take.

    Attributes:
        choices: All of them, by K.
        chosen: One of them.
        reason: Why; of a single one there is nothing to say.
        found: Whether it is worth taking: where none is better than chance, `chosen` is merely used.
    """

    choices: list[Health]
    chosen: Health
    reason: str
    found: bool = True

    def as_json(self) -> list[dict[str, Any]]:
        """Return what result.json says of each of them."""
        return [each.as_json() | {"recommended": self.found and each is self.chosen} for each in self.choices]

    def title(self) -> str:
        """Say which K is recommended, if one is."""
        k = self.chosen.num_clusters
        return f"K = {k} is recommended" if self.found else "nothing was found: no K is recommended"

    def line(self) -> str:
        """Say which K is recommended and why, or that none is."""
        used = "" if self.found else f"; K = {self.chosen.num_clusters} is used until you choose another"
        return f"{self.title()}: {self.reason}{used}"


def recommend(choices: Sequence[Health]) -> Recommendation:
    """Choose among heads of different K the largest whose sub-heads agree as well as those of any other.

    Sub-heads that start from different weights find the same clusters where the images have that many, and different
    ones where clusters must be split or merged at will: stability, as in Lange et al., "Stability-based validation of
    clustering solutions", Neural Computation 2004. "As well" is within one standard error of the best mean, as in the
    rule of Breiman et al. (1984); the largest, because a coarser clustering that is as stable says less. A head that
    leaves clusters unused does not count, unless all do.

    Where no agreement differs from chance (an ARI of 0) by two of its standard errors, or all images lie in one
    cluster, nothing was found. Of sub-heads by chance that lets 2 to 5 in a hundred pass.

    Args:
        choices: One head of each K; if there are several, each with an agreement and its error.
    """
    ordered = sorted(choices, key=lambda choice: choice.num_clusters)
    if len(ordered) == 1:
        return Recommendation(ordered, ordered[0], "")
    complete = [choice for choice in ordered if choice.used_clusters == choice.num_clusters] or ordered
    best = max(complete, key=lambda choice: choice.measured[0])
    mean, error = best.measured
    if not any(_differs_from_chance(choice) for choice in complete):
        best_of = f"ARI {best.agreement_text()}, of K = {best.num_clusters}"
        reason = f"no agreement differs from chance; the best is {best_of}"
        return Recommendation(ordered, best, reason, found=False)
    chosen = [choice for choice in complete if choice.measured[0] >= mean - error][-1]
    if chosen is best:
        reason = f"its sub-heads agree best, ARI {best.agreement_text()}, and no larger K comes within that error"
    else:
        reason = (
            f"its sub-heads agree, with ARI {chosen.agreement_text()}, within the error as well as the best ones, "
            f"those of K = {best.num_clusters} with {best.agreement_text()}, and it tells more apart"
        )
    return Recommendation(ordered, chosen, reason)


def _differs_from_chance(choice: Health) -> bool:
    """Whether sub-heads agree more than by chance."""
    mean, error = choice.measured
    return choice.used_clusters > 1 and mean > _FROM_CHANCE * error
