"""The network of a run and all that a step changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from iic_dist.config import Config
from iic_dist.config.build import build_objectives
from iic_dist.distributed import Place
from iic_dist.evaluation.sub_heads import SubHeadRecord
from iic_dist.losses import IICTerms
from iic_dist.losses.step import StepLosses, Terms
from iic_dist.models import ClusterNet, SubHeads, distribute
from iic_dist.training.guard import StepGuard
from iic_dist.training.optim import build_optimizer
from iic_dist.training.schedule import kind_of_head
from iic_dist.training.stuck import StuckSubHeads

Views = Sequence[tuple[Sequence[str], Tensor]]
"""The input of a step: names of heads, and the views (views * N, C, S, S) that they are trained on."""


class Learner:
    """A network, its losses and its optimizer on one rank.

    Args:
        config: Complete; what it says of optimizer, losses and precision counts for these steps.
        model: The network, where it is trained.
        heads: Which of its heads are trained.
        place: This rank.
        device: Of the network.
        heads_take_turns: Whether there are steps in which some of these heads take no part.
        confidence: None, or the heads with clusters learn labels of their own that are surer than this.

    Attributes:
        model: The network, not wrapped in DDP.
        sub_heads: How the sub-heads did in the last pass.

    Collective: all ranks must construct it, and call its methods, together.
    """

    def __init__(
        self,
        config: Config,
        model: ClusterNet,
        heads: Sequence[str],
        place: Place,
        device: torch.device,
        *,
        heads_take_turns: bool,
        confidence: float | None = None,
    ) -> None:
        train, optim = config.train, config.optim
        self.precision, self.clip_norm, self.device = train.precision, optim.clip_norm, device
        self.model = model
        self.network = distribute(model, place, device, compiled=train.compile, heads_take_turns=heads_take_turns)
        self.optimizer = build_optimizer(
            model, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum
        )
        objectives, clustering = build_objectives(config, device), config.clustering_heads
        self.sub_heads = SubHeadRecord(model.shapes, objectives, device, config.dtype)
        self.stuck = StuckSubHeads(
            {name: head for name in clustering if isinstance(head := model.heads[name], SubHeads)},
            self.optimizer,
            # Where several K are compared by the agreement of their sub-heads, copies would spoil it.
            patience=train.restart_after if len(clustering) == 1 else 0,
            seed=config.run.seed,
        )
        weights = {
            head: getattr(config.loss, kind_of_head(head)) / (len(clustering) if head in clustering else 1)
            for head in heads
        }
        self.losses = StepLosses(
            weights,
            objectives,
            temperature=config.loss.temperature,
            impl=config.loss.impl,
            views=1 + config.views.repeats,
            world_size=place.world_size,
            confidence=confidence,
        )
        self.guard = StepGuard(model, self.optimizer, device, train.max_skipped_steps)

    def step(self, views: Views, learning_rate: float, stop: bool) -> Terms:
        """Update the weights once; nothing here waits for the device.

        Args:
            views: What each group of heads is trained on.
            learning_rate: Of this step.
            stop: Whether this rank was asked to stop.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_share", 1.0)
        self.guard.begin()
        inputs = [part for _, part in views]
        with self._autocast():
            outputs = self.network(
                torch.cat(inputs) if len(inputs) > 1 else inputs[0], [head for heads, _ in views for head in heads]
            )
        rows = [len(part) for part in inputs]
        total, terms = self.losses(
            [(head, outputs[head].split(rows)[place]) for place, (heads, _) in enumerate(views) for head in heads]
        )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        skipped = self.guard.end(total.detach(), stop, self.clip_norm)
        self.optimizer.step()
        for head, value in terms.items():
            if isinstance(value, IICTerms):
                self.sub_heads.add(head, value.joint, skipped)
        return terms

    def end_pass(self, heads: Sequence[str], epoch: int) -> list[str]:
        """Judge the sub-heads of these heads by the pass that ends; return warnings.

        Sync: waits for the device.
        """
        return self.sub_heads.end_pass(heads) + self.stuck.end_pass(heads, self.sub_heads.losses, epoch)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs to go on: tensors and plain values alone."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sub_heads": self.sub_heads.state_dict(),
            "stuck": self.stuck.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken; further keys are passed over."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        self.sub_heads.load_state_dict(state["sub_heads"])
        self.stuck.load_state_dict(state["stuck"])
