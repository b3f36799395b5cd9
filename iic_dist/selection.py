"""Which sub-head of a clustering head is the best, judged by its loss over a whole pass; no label is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from iic_dist.ops.iic import iic_information


class SubHeadLosses:
    """The loss of every sub-head on the joint of a whole pass, which is less noisy than that of a batch.

    Args:
        shapes: (H, K) of each clustering head, by its name.
        entropy_weight: Of the IIC loss.
        device: Where the joints are.
        dtype: Of the joints.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], entropy_weight: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.entropy_weight = entropy_weight
        self.losses = {head: torch.zeros(h, device=device) for head, (h, _) in shapes.items()}
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
            joint = self._sums[head]
            sums = torch.cat([joint.flatten(), joint.new_full((1,), steps)])
            self.losses[head] = iic_information(sums, joint.shape[-1], self.entropy_weight).loss

    def selected(self, head: str = "clustering") -> int:
        """Return the sub-head with the lowest loss over the last pass of its head."""
        return int(self.losses[head].argmin())
