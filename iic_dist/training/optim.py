"""Optimizers and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from iic_dist.errors import UsageError
from iic_dist.models import SubHeads
from iic_dist.training.muon import Muon


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, weight_decay: float = 0.0, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """Make a fused optimizer over the trained parameters of `model`, which must be where they are trained.

    Weight decay acts on matrices and kernels alone: vectors are biases and normalisation, which it only harms.
    Fused ones are the fastest, and the only ones that can skip a step on the device's own word (`StepGuard`).

    Args:
        name: adam, adamw, sgd, or muon, which is Adam for sub-heads: each of them is to go its own way.
        lr: Learning rate, which the trainer overwrites in each step, times the group's "lr_share" if it has one.
        momentum: Of SGD and Muon.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    if name == "muon":
        heads = {id(p) for module in model.modules() if isinstance(module, SubHeads) for p in module.parameters()}
        turned = [p for p in matrices if id(p) not in heads and p.dim() != 3]  # of three: a transformer's positions
        kept = {id(p) for p in turned}
        groups = _groups([p for p in matrices if id(p) not in kept], vectors, weight_decay)
        return Muon(turned, groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
    groups = _groups(matrices, vectors, weight_decay)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
        if momentum:
            for parameter in trained:  # torch would leave them uninitialised where it skips the first step
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    raise UsageError(f"optim.name={name!r}: must be adam, adamw, sgd or muon")


def _groups(matrices: list[nn.Parameter], vectors: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def learning_rate(step: int, *, total_steps: int, base: float, schedule: str, warmup_steps: int = 0) -> float:
    """Return the learning rate of a step.

        base * min(1, (step + 1) / warmup_steps) * (1 for "constant"; 1/2 (1 + cos(pi t)) for "cosine")

    with t the share of the steps after the warm-up that lies behind.

    Args:
        step: From 0 to total_steps - 1.
        schedule: constant or cosine.
        warmup_steps: Steps of linear rise; 0 = none.
    """
    if schedule not in ("constant", "cosine"):
        raise UsageError(f"optim.schedule={schedule!r}: must be constant or cosine")
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * done))
