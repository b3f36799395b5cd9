"""Fresh sub-heads trained on pairs of an image and one of its neighbours in features that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iic_dist import distributed
from iic_dist.errors import UsageError
from iic_dist.losses import IICTerms, iic_loss
from iic_dist.losses.objective import Objective
from iic_dist.models import SubHeads
from iic_dist.models.feature_heads import FeatureSpace, FeatureSubHeads
from iic_dist.ops.iic import Information, iic_information, towards_prior
from iic_dist.ops.philox import permutation, uniforms
from iic_dist.training.optim import build_optimizer, learning_rate

_EPOCH = 2**31  # the epochs of this stage, in the counter of the random numbers, lie behind those of all others
_PARTNER = 2**31 + 2  # the "view" of the random numbers that choose partners; no image has so many views
_ROWS = 8192  # images whose pairs are judged together


def draw_partners(neighbours: Tensor, images: Tensor, seed: int, epoch: int, count: int) -> Tensor:
    """Draw neighbours of some images, (count * n,) int64: repeat r of image i in row r * n + i.

    Args:
        neighbours: (N, k) int64 on the CPU.
        images: (n,) int64 on the CPU.
        seed, epoch: With the image they decide what is drawn.
        count: Of each image.
    """
    drawn = uniforms(seed, epoch, images, _PARTNER, count)
    return neighbours[images].gather(1, (drawn * neighbours.shape[1]).long()).T.flatten()


@dataclass(frozen=True)
class HeadTraining:
    """How the heads are trained.

    Attributes:
        steps: Updates.
        partners: Neighbours of each image in a step.
        batch_size: Images in a step over all ranks; of fewer images all.
        lr: Learning rate of AdamW, which falls to zero as a cosine.
        weight_decay: Of AdamW.
        seed: Of the run: decides first weights, batches and partners.
        impl: Of the loss: auto, fused or torch.
    """

    steps: int
    partners: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    impl: str = "auto"


class NeighbourTraining:
    """Trains sub-heads on neighbours; every rank makes one, on the same vectors.

    Step s takes the s-th slice of the permutations of (seed, 0), (seed, 1), ..., each rank its part; the partners of an
    image are a function of (seed, step, image). Nothing depends on the number of ranks.

    Args:
        vectors: (N, D), what the space makes of the features; on the device, or mapped on the CPU.
        neighbours: (N, k) int64 on the CPU.
        shapes: (H, K) of each head, by name.
        objectives: What each head is trained towards.
        settings: How.
        device: Where to compute.

    Attributes:
        step: Updates done.

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
    ) -> None:
        self.vectors, self.neighbours = vectors, neighbours
        self.objectives, self.settings, self.device = objectives, settings, device
        count, world_size = len(vectors), distributed.world_size()
        if count < world_size:
            raise UsageError(f"{count} images for {world_size} ranks: use at most one rank an image")
        self.batch_size = max(world_size, min(settings.batch_size, count))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.heads = nn.ModuleDict({name: SubHeads(vectors.shape[1], *shape) for name, shape in shapes.items()})
        self.heads.to(device, vectors.dtype)
        self.parameters = list(self.heads.parameters())
        self.optimizer = build_optimizer(self.heads, "adamw", lr=settings.lr, weight_decay=settings.weight_decay)
        self.step = 0
        self._order: tuple[int, Tensor] | None = None

    def train_step(self) -> dict[str, IICTerms]:
        """Update the heads once; return the terms of each.

        Collective: all ranks must call; reduces the joints and the gradients.
        """
        images = self._batch()
        partners = draw_partners(
            self.neighbours, images, self.settings.seed, _EPOCH + self.step, self.settings.partners
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
        """Judge all sub-heads by the joint of all images with all their neighbours, exactly.

        Collective: all ranks must call, each judges its share; reduces the joints.
        """
        return {name: self._judge(name, head) for name, head in self.heads.items()}

    def _judge(self, name: str, head: nn.Module) -> Information:
        assert isinstance(head, SubHeads)
        count, (h, k) = len(self.vectors), head.shape
        logits = torch.cat([head(self._gather(rows)) for rows in torch.arange(count).split(_ROWS)])
        probabilities = torch.softmax(logits, -1)
        batches = list(torch.arange(count).split(_ROWS))
        bounds = [len(batches) * r // distributed.world_size() for r in range(distributed.world_size() + 1)]
        sums = torch.zeros(h * k * k + 1, dtype=torch.float64, device=self.device)
        for rows in batches[bounds[distributed.rank()] : bounds[distributed.rank() + 1]]:
            partners = sum(probabilities[column] for column in self.neighbours[rows].to(self.device).unbind(1))
            joint = torch.einsum("nhk,nhl->hkl", probabilities[rows.to(self.device)], partners)
            sums[:-1] += joint.double().flatten()
            sums[-1] += len(rows) * self.neighbours.shape[1]
        distributed.all_reduce_sum(sums)
        towards = self.objectives[name]
        terms = Information(*iic_information(sums, k, towards.entropy_weight))
        if towards.prior is not None:
            terms = towards_prior(terms, sums[-1], towards.prior, towards.entropy_weight)
        return terms

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
        return {"step": self.step, "heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.step = state["step"]
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
