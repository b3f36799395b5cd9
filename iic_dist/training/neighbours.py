"""Fresh sub-heads trained on pairs of an image and one near it, in features that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from iic_dist import distributed
from iic_dist.errors import UsageError
from iic_dist.losses import IICTerms, iic_loss
from iic_dist.losses.objective import Objective
from iic_dist.models import SubHeads
from iic_dist.models.feature_heads import FeatureSpace, FeatureSubHeads
from iic_dist.ops.iic import Information, iic_information, towards_prior
from iic_dist.ops.philox import permutation, uniforms
from iic_dist.training.head_plan import EXPLORING_WEIGHT, FIRST_DEVIATION, POOL, HeadTraining, plan
from iic_dist.training.optim import build_optimizer, learning_rate

_EPOCH = 2**31  # the epochs of this stage, in the counter of the random numbers, lie behind those of all others
_PARTNER = 2**31 + 2  # the "view" of the random numbers that choose partners; no image has so many views
_ROWS = 8192  # images whose pairs are judged together


def draw_partners(neighbours: Tensor, images: Tensor, seed: int, epoch: int, count: int, walk: int = 1) -> Tensor:
    """Draw partners of some images by random walks, (count * n,) int64: repeat r of image i in row r * n + i.

    Args:
        neighbours: (N, k) int64 on the CPU.
        images: (n,) int64 on the CPU.
        seed, epoch: With the image they decide what is drawn.
        count: Of each image.
        walk: Steps, each to one of the neighbours of the image before.
    """
    drawn = uniforms(seed, epoch, images, _PARTNER, count * walk).view(len(images), count, walk)
    partners = images.unsqueeze(1).expand(-1, count)
    for choice in (drawn * neighbours.shape[1]).long().unbind(2):
        partners = neighbours[partners, choice]
    return partners.T.flatten()


class NeighbourTraining:
    """Trains sub-heads on neighbours; every rank makes one, on the same vectors.

    Random heads explore; then others come in that start at clusters, all are trained on partners by random walks, and
    of a growing part of the steps the better ones by the loss over all images remain.

    Step s takes the s-th slice of the permutations of (seed, 0), (seed, 1), ..., each rank its part; the partners of an
    image are a function of (seed, step, image). Nothing depends on the number of ranks.

    Args:
        vectors: (N, D), what the space makes of the features; on the device, or mapped on the CPU.
        neighbours: (N, k) int64 on the CPU.
        shapes: (H, K) of each head in the end, by name.
        objectives: What each head is trained towards, and judged by.
        settings: How.
        device: Where to compute.
        starts: Gives for K and a number S of sub-heads the weights (S, K, D) that they start at, the same on all ranks,
            which call it together; see `ClusterStarts`. None: all start at random.

    Attributes:
        step: Updates done.
        heads: Those that are trained now.

    Raises:
        UsageError: there are fewer images than ranks.
    """

    def __init__(
        self,
        vectors: Tensor,
        neighbours: Tensor,
        shapes: Mapping[str, tuple[int, int]],
        objectives: Mapping[str, Objective],
        settings: HeadTraining,
        device: torch.device,
        starts: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        self.vectors, self.neighbours, self.shapes = vectors, neighbours, dict(shapes)
        self.objectives, self.settings, self.device, self.starts = objectives, settings, device, starts
        count, world_size = len(vectors), distributed.world_size()
        if count < world_size:
            raise UsageError(f"{count} images for {world_size} ranks: use at most one rank an image")
        self.batch_size = max(world_size, min(settings.batch_size, count))
        self.step = 0
        self.plan = plan(settings.steps)
        self._order: tuple[int, Tensor] | None = None
        self._take(0, {name: self._random(name, POOL * h) for name, (h, _) in self.shapes.items()})

    def _random(self, name: str, sub_heads: int) -> SubHeads:
        """Return a head of first weights, the same on all ranks; they leave the state of random numbers alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            width = self.vectors.shape[1]
            return SubHeads(width, sub_heads, self.shapes[name][1], std=FIRST_DEVIATION * width**-0.5)

    def _take(self, phase: int, heads: Mapping[str, SubHeads]) -> None:
        """Train these heads from now on."""
        self.phase = phase
        self.heads = nn.ModuleDict(dict(heads)).to(self.device, self.vectors.dtype)
        self.parameters = list(self.heads.parameters())
        self.optimizer = build_optimizer(
            self.heads, "adamw", lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )

    def _go_on(self) -> None:
        """Enter the next phase: with the heads of the graph beside the random ones, or with the best alone."""
        phase = self.phase + 1
        judged = {} if self.plan[self.phase].explores else self.judge()
        heads = {}
        for name, head in self.heads.items():
            assert isinstance(head, SubHeads)
            wanted = self.plan[phase].pool * self.shapes[name][0]
            heads[name] = self._best(name, judged[name].loss, wanted) if judged else self._joined(name, head, wanted)
        self._take(phase, heads)

    def _joined(self, name: str, head: SubHeads, wanted: int) -> SubHeads:
        """Return a head of what was random and of starts at the graph."""
        joined, (h, k) = self._random(name, wanted).to(head.linear.weight), head.shape
        with torch.no_grad():
            if self.starts is not None:
                joined.linear.weight[h * k :] = self.starts(k, wanted - h).flatten(0, 1)
            joined.linear.weight[: h * k] = head.linear.weight
            joined.linear.bias[: h * k] = head.linear.bias
        return joined

    def _best(self, name: str, losses: Tensor, wanted: int) -> SubHeads:
        """Return a head of the sub-heads of lowest loss, in the order that they had."""
        kept = losses.argsort(stable=True)[:wanted].sort().values
        head = self.heads[name]
        assert isinstance(head, SubHeads)
        best = self._random(name, wanted).to(head.linear.weight)
        state = head.linear.state_dict()
        best.linear.load_state_dict({key: _chosen(value, head.shape, kept) for key, value in state.items()})
        return best

    def train_step(self) -> dict[str, IICTerms]:
        """Update the heads once; return the terms of each.

        Collective: all ranks must call; reduces the joints and the gradients.
        """
        while self.phase + 1 < len(self.plan) and self.step >= self.plan[self.phase + 1].first:
            self._go_on()
        explores = self.plan[self.phase].explores
        images = self._batch()
        partners = draw_partners(
            self.neighbours,
            images,
            self.settings.seed,
            _EPOCH + self.step,
            self.settings.partners,
            1 if explores else self.settings.walk,
        )
        rows = self._gather(torch.cat([images, partners]))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                self.step, total_steps=self.settings.steps, base=self.settings.lr, schedule="cosine"
            )
        terms: dict[str, IICTerms] = {}
        for name, head in self.heads.items():
            first, second = head(rows).tensor_split([len(images)])
            towards = self.objectives[name]
            if explores:
                towards = replace(towards, entropy_weight=max(towards.entropy_weight, EXPLORING_WEIGHT))
            terms[name] = iic_loss(
                first, second, entropy_weight=towards.entropy_weight, prior=towards.prior, impl=self.settings.impl
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack([each.loss.sum() for each in terms.values()]).sum().backward()
        self._average_gradients()
        self.optimizer.step()
        self.step += 1
        return {name: each._replace(loss=each.loss.detach()) for name, each in terms.items()}

    def _batch(self) -> Tensor:
        """Choose this rank's images of the step, (n,) int64 on the CPU."""
        epoch, position = divmod(self.step, len(self.vectors) // self.batch_size)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self.settings.seed, _EPOCH + epoch, len(self.vectors)))
        slice_ = self._order[1][position * self.batch_size : (position + 1) * self.batch_size]
        rank, world_size = distributed.rank(), distributed.world_size()
        return slice_[len(slice_) * rank // world_size : len(slice_) * (rank + 1) // world_size]

    def _gather(self, indices: Tensor) -> Tensor:
        if self.vectors.is_cuda:
            return self.vectors[indices.pin_memory().to(self.device, non_blocking=True)]
        return self.vectors.index_select(0, indices).to(self.device)  # half the time of vectors[indices]

    def _average_gradients(self) -> None:
        if distributed.world_size() == 1:
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = distributed.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = (flat / distributed.world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def judge(self) -> dict[str, Information]:
        """Judge all sub-heads by the joint of all images with all that random walks from them reach, exactly.

        Collective: all ranks must call, each judges its share of the sub-heads; reduces the joints.
        """
        near = self.neighbours.to(self.device)
        return {name: self._judge(name, head, near) for name, head in self.heads.items()}

    def _judge(self, name: str, head: nn.Module, near: Tensor) -> Information:
        assert isinstance(head, SubHeads)
        count, (h, k) = len(self.vectors), head.shape
        sums = torch.zeros(h * k * k + 1, dtype=torch.float64, device=self.device)
        sums[-1] = count
        joint = sums[:-1].view(h, k, k)
        rank, world_size = distributed.rank(), distributed.world_size()
        for sub_head in range(h * rank // world_size, h * (rank + 1) // world_size):
            probabilities = self._probabilities(head, sub_head)
            reached = probabilities
            for _ in range(self.settings.walk):
                reached = functional.embedding_bag(near, reached, mode="mean")
            for rows in torch.arange(count, device=self.device).split(_ROWS):
                joint[sub_head] += (probabilities[rows].T @ reached[rows]).double()
        distributed.all_reduce_sum(joint)
        towards = self.objectives[name]
        terms = Information(*iic_information(sums, k, towards.entropy_weight))
        if towards.prior is not None:
            terms = towards_prior(terms, sums[-1], towards.prior, towards.entropy_weight)
        return terms

    def _probabilities(self, head: SubHeads, sub_head: int) -> Tensor:
        """Return the clusters' probabilities of all images by one sub-head, (N, K)."""
        k = head.shape[1]
        weight, bias = (each[sub_head * k : (sub_head + 1) * k] for each in (head.linear.weight, head.linear.bias))
        parts = torch.arange(len(self.vectors)).split(_ROWS)
        return torch.cat([functional.linear(self._gather(rows), weight, bias).softmax(1) for rows in parts])

    def finished(self, space: FeatureSpace) -> dict[str, FeatureSubHeads]:
        """Return the heads on the features themselves, to stand in a network."""
        heads = {}
        for name, head in self.heads.items():
            assert isinstance(head, SubHeads)
            heads[name] = FeatureSubHeads(space, *head.shape).to(self.device, self.vectors.dtype)
            heads[name].linear.load_state_dict(head.linear.state_dict())
        return heads

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs to go on, with the same vectors."""
        return {
            "step": self.step,
            "phase": self.phase,
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.step = state["step"]
        pool = self.plan[state["phase"]].pool
        self._take(state["phase"], {name: self._random(name, pool * h) for name, (h, _) in self.shapes.items()})
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])


def _chosen(values: Tensor, shape: tuple[int, int], kept: Tensor) -> Tensor:
    """Return those rows of (H * K, ...) values that belong to some sub-heads."""
    return values.unflatten(0, shape)[kept].flatten(0, 1)
