"""Sub-heads that stay stuck are started again from the best one of their head; no label is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from iic_dist import distributed
from iic_dist.models import SubHeads
from iic_dist.ops.philox import uniforms

MARGIN = 0.02
"""A sub-head is stuck where its loss is more than this times ln K above the lowest one of its head."""

NOISE = 0.1
"""Deviation of what is added to the copied weights, times their root mean square."""

_FIRST_VIEW = 2**31
"""The random numbers of a restart are those of "views" from here on; no image has so many."""


class StuckSubHeads:
    """Counts for how many passes over the images each sub-head has been stuck, and starts those again that stay so.

    A restarted sub-head gets the weights of the best one, with a little noise, and the optimizer's state of the best
    one. The noise is a function of seed, epoch, head and sub-head, so restarts are the same on all ranks, and in a run
    that is resumed.

    Args:
        heads: The heads with clusters, by name.
        optimizer: Whose state of their weights moves along.
        patience: A sub-head is started again after so many passes in a row in which it was stuck; 0 = never.
        seed: Of the run.

    Attributes:
        passes: Of each head, for how many passes each sub-head has been stuck.
        restarts: Of each head, how often each sub-head has been started again.
    """

    def __init__(
        self, heads: Mapping[str, SubHeads], optimizer: torch.optim.Optimizer, patience: int, seed: int
    ) -> None:
        self.heads, self.optimizer, self.patience, self.seed = dict(heads), optimizer, patience, seed
        self.passes = {name: [0] * head.shape[0] for name, head in heads.items()}
        self.restarts = {name: [0] * head.shape[0] for name, head in heads.items()}

    def end_pass(self, heads: Iterable[str], losses: Mapping[str, Tensor], epoch: int) -> list[str]:
        """Judge the sub-heads of a pass that ends, start those again that are due; return a line for each of these.

        Args:
            heads: What was trained; heads that are not watched are passed over.
            losses: (H,) of each head over its last pass, nats.
            epoch: The one that the pass belongs to.

        Collective: all ranks must call; rank 0's losses count. Sync: waits for the device.
        """
        if not self.patience:
            return []
        judged = {name: losses[name].tolist() for name in heads if name in self.heads}
        if not judged:
            return []
        lines = []
        for name, values in distributed.broadcast(judged).items():
            best = min(range(len(values)), key=values.__getitem__)
            margin = MARGIN * math.log(self.heads[name].shape[1])
            for sub_head, loss in enumerate(values):
                stuck = loss - values[best] > margin
                self.passes[name][sub_head] = self.passes[name][sub_head] + 1 if stuck else 0
                if self.passes[name][sub_head] == self.patience:
                    self._restart(name, sub_head, best, epoch)
                    lines.append(
                        f"{name}: sub-head {sub_head} was stuck for {self.patience} passes at a loss of {loss:.3f} and "
                        f"starts again from sub-head {best} at {values[best]:.3f}"
                    )
        return lines

    @torch.no_grad()
    def _restart(self, name: str, sub_head: int, best: int, epoch: int) -> None:
        head, k = self.heads[name], self.heads[name].shape[1]
        to, source = slice(sub_head * k, (sub_head + 1) * k), slice(best * k, (best + 1) * k)
        for parameter in (head.linear.weight, head.linear.bias):
            for tensor in (parameter, *self.optimizer.state[parameter].values()):
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:  # not Adam's count of steps
                    tensor[to] = tensor[source]
        weight = head.linear.weight[to]
        view = _FIRST_VIEW + (list(self.heads).index(name) << 16) + sub_head
        noise = uniforms(self.seed, epoch, torch.arange(weight.numel()), view, 1).view_as(weight).to(weight) - 0.5
        weight += noise * (math.sqrt(12) * NOISE * weight.square().mean().sqrt())  # 1 / sqrt(12): deviation of uniforms
        self.passes[name][sub_head] = 0
        self.restarts[name][sub_head] += 1

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs to go on."""
        return {"passes": self.passes, "restarts": self.restarts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.passes = {name: list(counts) for name, counts in state["passes"].items()}
        self.restarts = {name: list(counts) for name, counts in state["restarts"].items()}
