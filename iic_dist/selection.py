"""Which sub-head of a clustering head is the best, judged by its loss over a whole pass; no label is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from iic_dist.objective import Objective
from iic_dist.ops.iic import iic_information, towards_prior

USED = 0.1
"""A cluster counts as used where its share of the images is above this times 1 / K."""


def used_clusters(shares: Tensor) -> Tensor:
    """Count the clusters that are used: (..., K) shares of the images -> (...)."""
    return (shares > USED / shares.shape[-1]).sum(-1)


class SubHeadLosses:
    """The loss of every sub-head on the joint of a whole pass, which is less noisy than that of a batch.

    Args:
        shapes: (H, K) of each head with clusters, by its name.
        objectives: Of each of these heads.
        device: Where the joints are.
        dtype: Of the joints.

    Attributes:
        losses: (H,) of each head over its last pass, nats.
        information: (H,) of each head over its last pass, nats: mutual information of the views.
        entropy: (H,) of each head over its last pass, nats, of the marginal.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        objectives: Mapping[str, Objective],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.objectives = objectives
        self.losses, self.information, self.entropy = (
            {head: torch.zeros(h, device=device) for head, (h, _) in shapes.items()} for _ in range(3)
        )
        self._sums = {head: torch.zeros(h, k, k, device=device, dtype=dtype) for head, (h, k) in shapes.items()}

    def begin_pass(self, heads: Iterable[str]) -> None:
        """Forget the joints of the last pass of these heads."""
        for head in self._sums.keys() & set(heads):
            self._sums[head].zero_()

    def add(self, head: str, joint: Tensor) -> None:
        """Take in the (H, K, K) joint of one step, over all ranks."""
        self._sums[head] += joint

    def end_pass(self, heads: Iterable[str], steps: int) -> None:
        """Compute the losses of a pass of so many steps."""
        for head in self._sums.keys() & set(heads):
            joint, objective = self._sums[head], self.objectives[head]
            sums = torch.cat([joint.flatten(), joint.new_full((1,), steps)])
            terms = iic_information(sums, joint.shape[-1], objective.entropy_weight)
            if objective.prior is not None:
                terms = towards_prior(terms, sums[-1], objective.prior, objective.entropy_weight)
            self.losses[head] = terms.loss
            self.information[head], self.entropy[head] = terms.mutual_information, terms.entropy

    def selected(self, head: str = "clustering") -> int:
        """Return the sub-head with the lowest loss over the last pass of its head."""
        return int(self.losses[head].argmin())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs to go on between two passes."""
        return {"losses": self.losses, "information": self.information, "entropy": self.entropy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        for name, values in self.state_dict().items():
            for head in values:
                values[head] = state[name][head].to(values[head].device)
