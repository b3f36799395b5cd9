"""How good the sub-heads of the clustering heads are, judged over a whole pass; no label is read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from iic_dist.losses.objective import Objective
from iic_dist.ops.iic import iic_information, towards_prior

USED = 0.1
"""A cluster counts as used where its share of the images is above this times 1 / K."""

LEAST_ENTROPY = 0.1
"""A sub-head has collapsed where the entropy of its clusters is under this times ln K."""

LEAST_USED = 0.5
"""A sub-head has collapsed where less than this share of its clusters is used."""


def used_clusters(shares: Tensor) -> Tensor:
    """Count the clusters that are used: (..., K) shares of the images -> (...)."""
    return (shares > USED / shares.shape[-1]).sum(-1)


class SubHeadRecord:
    """The loss of every sub-head on the joint of a whole pass, which is less noisy than that of a batch.

    Args:
        shapes: (H, K) of each head with clusters, by its name.
        objectives: Of each of these heads.
        device: Where the joints are.
        dtype: Of the joints.

    Attributes:
        losses: (H,) of each head over its last pass, in nats; infinite before the first.
        information: (H,) likewise, the mutual information of the views, in nats; 0 before the first.
        entropy: (H,) likewise, of the marginal.
        collapsed: Of each head the sub-heads that put (nearly) all images of its last pass into a few clusters.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        objectives: Mapping[str, Objective],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shapes, self.objectives = dict(shapes), dict(objectives)
        self.losses = {head: torch.full((h,), math.inf, device=device, dtype=dtype) for head, (h, _) in shapes.items()}
        self.information, self.entropy = (
            {head: torch.zeros(h, device=device, dtype=dtype) for head, (h, _) in shapes.items()} for _ in range(2)
        )
        self.collapsed: dict[str, list[int]] = {head: [] for head in shapes}
        # Of the pass that is going on: the sum of the joints, and as the last number how many there are.
        self._sums = {head: torch.zeros(h * k * k + 1, device=device, dtype=dtype) for head, (h, k) in shapes.items()}

    def begin_pass(self, heads: Iterable[str]) -> None:
        """Forget the joints of the last pass of these heads."""
        for head in self._sums.keys() & set(heads):
            self._sums[head].zero_()

    def add(self, head: str, joint: Tensor, skipped: Tensor) -> None:
        """Take in the (H, K, K) joint of one step, over all ranks, unless the step was skipped: (), bool."""
        joint_and_one = torch.cat([joint.flatten(), joint.new_ones(1)])
        self._sums[head] += joint_and_one.masked_fill(skipped, 0)

    def end_pass(self, heads: Iterable[str]) -> list[str]:
        """Judge these heads by the pass that ends; return a line for each that has collapsed further.

        Sync: waits for the device.
        """
        warnings = []
        for head in [head for head in heads if head in self._sums]:
            sums, (h, k) = self._sums[head], self.shapes[head]
            if sums[-1] == 0:  # all of its steps were skipped
                continue
            objective = self.objectives[head]
            terms = iic_information(sums, k, objective.entropy_weight)
            if objective.prior is not None:
                terms = towards_prior(terms, sums[-1], objective.prior, objective.entropy_weight)
            self.losses[head] = terms.loss
            self.information[head], self.entropy[head] = terms.mutual_information, terms.entropy
            used = used_clusters(terms.joint.sum(-1))
            few = (terms.entropy < LEAST_ENTROPY * math.log(k)) | (used < LEAST_USED * k)
            collapsed = [place for place, bad in enumerate(few.tolist()) if bad]
            if not set(collapsed) <= set(self.collapsed[head]):
                worst = int(terms.entropy.argmin())
                warnings.append(
                    f"the {head} head has collapsed in {len(collapsed)} of its {h} sub-heads ({collapsed}): sub-head "
                    f"{worst} uses {int(used[worst])} of {k} clusters, with an entropy of "
                    f"{float(terms.entropy[worst]) / math.log(k):.3f} ln K; a larger loss.entropy_weight pushes "
                    "them apart"
                )
            self.collapsed[head] = collapsed
        return warnings

    def selected(self, head: str = "clustering") -> int:
        """Return the sub-head with the lowest loss over the last pass of its head."""
        return int(self.losses[head].argmin())

    def lowest_loss(self, heads: Iterable[str] = ("clustering",)) -> float:
        """Return the mean over some heads of the loss of their selected sub-heads, infinite before their first pass.

        Sync: waits for the device.
        """
        return statistics.fmean(float(self.losses[head].min()) for head in heads)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs to go on, also in the middle of a pass."""
        return {**self._judged(), "collapsed": self.collapsed, "sums": self._sums}

    def _judged(self) -> dict[str, dict[str, Tensor]]:
        return {"losses": self.losses, "information": self.information, "entropy": self.entropy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        for head in self._sums:
            for name, values in self._judged().items():
                values[head] = state[name][head].to(values[head])
            self._sums[head].copy_(state["sums"][head])
        self.collapsed = {head: list(state["collapsed"][head]) for head in self.collapsed}
