"""The losses of a training step, of all heads that take part in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from iic_dist.losses.iic import IICTerms, iic_loss
from iic_dist.losses.nt_xent import start_nt_xent_loss
from iic_dist.losses.objective import Objective
from iic_dist.losses.self_label import self_label_loss

Terms = dict[str, IICTerms | Tensor]
"""Of each head that took part in a step: its IIC terms, or its contrastive loss; on the device, no gradient."""


class StepLosses:
    """Computes the weighted sum of the losses of some heads over the global batch.

    Args:
        weights: Of each head's loss.
        objectives: What each head with clusters is trained towards.
        temperature: Of the contrastive loss.
        impl: auto, fused or torch.
        views: Views of each image, 1 + R; the contrastive loss is the mean over all pairs of them.
        world_size: Number of ranks, all with as many images.
        confidence: None, or the heads with clusters are trained on labels of their own: the second view towards the
            cluster of the first, where that is surer than this.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        objectives: Mapping[str, Objective],
        *,
        temperature: float,
        impl: str,
        views: int,
        world_size: int,
        confidence: float | None = None,
    ) -> None:
        self.weights, self.objectives = weights, objectives
        self.temperature, self.impl = temperature, impl
        self.views, self.world_size, self.confidence = views, world_size, confidence

    def __call__(self, outputs: Sequence[tuple[str, Tensor]]) -> tuple[Tensor, Terms]:
        """Return the loss to differentiate, and what to log of each head.

        Args:
            outputs: (views * N, ...) of each head, view by view, by the head's name. The contrastive head is to be the
                last: what it gathers travels while the other losses are computed.

        Collective: all ranks must call.
        """
        started = [(head, self._start(head, output)) for head, output in outputs]
        terms: Terms = {}
        weighted = []
        for head, finish in started:
            loss, terms[head] = finish()
            weighted.append(self.weights[head] * loss)
        return sum(weighted[1:], start=weighted[0]), terms

    def _start(self, head: str, outputs: Tensor) -> Callable[[], tuple[Tensor, IICTerms | Tensor]]:
        """Start what other work can run beside, and return what computes a head's loss."""
        n = len(outputs) // self.views
        first, second = outputs[:n], outputs[n:]

        def clustering() -> tuple[Tensor, IICTerms | Tensor]:
            towards = self.objectives[head]
            terms = iic_loss(first, second, entropy_weight=towards.entropy_weight, prior=towards.prior, impl=self.impl)
            described = terms._replace(loss=terms.loss.detach())
            if self.confidence is None:
                return terms.loss.mean(), described
            return self_label_loss(first, second, confidence=self.confidence).mean(), described

        if head in self.objectives:
            return clustering
        views = outputs.split(n)
        pairs = [
            start_nt_xent_loss(
                one, other, temperature=self.temperature, impl=self.impl, shard_sizes=[n] * self.world_size
            )
            for one, other in itertools.combinations(views, 2)
        ]

        def contrastive() -> tuple[Tensor, IICTerms | Tensor]:
            value = torch.stack([finish() for finish in pairs]).mean()
            return value, value.detach()

        return contrastive
