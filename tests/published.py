"""The losses as their papers write them, without any cleverness: the oracles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 2.2e-16


def iic(logits_a: Tensor, logits_b: Tensor, entropy_weight: float = 1.0) -> Tensor:
    """Ji et al.: of each sub-head the N x K x K outer products, summed, symmetric, normalised; (H,) losses.

    `logits_b` may hold R second views, repeat-major; the published code runs R copies of the first view.
    """
    repeats = len(logits_b) // len(logits_a)
    return torch.stack(
        [
            _iic_of_one(logits_a[:, h].softmax(1).repeat(repeats, 1), logits_b[:, h].softmax(1), entropy_weight)
            for h in range(logits_a.shape[1])
        ]
    )


def _iic_of_one(z: Tensor, z_other: Tensor, entropy_weight: float) -> Tensor:
    joint = (z.unsqueeze(2) * z_other.unsqueeze(1)).sum(0)
    joint = (joint + joint.t()) / 2
    joint = joint / joint.sum()
    row = joint.sum(1, keepdim=True).expand_as(joint).clamp(min=EPS)
    column = joint.sum(0, keepdim=True).expand_as(joint).clamp(min=EPS)
    joint = joint.clamp(min=EPS)
    return -(joint * (joint.log() - entropy_weight * row.log() - entropy_weight * column.log())).sum()


def nt_xent(embeddings_a: Tensor, embeddings_b: Tensor, temperature: float = 0.5) -> Tensor:
    """Chen et al.: cross-entropy over the whole similarity matrix without its diagonal."""
    z = F.normalize(torch.cat([embeddings_a, embeddings_b]), dim=1)
    similarity = z @ z.t() / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    positives = torch.arange(len(z)).roll(len(embeddings_a))
    return F.cross_entropy(similarity, positives)
