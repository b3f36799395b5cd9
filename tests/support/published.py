"""The losses as their papers write them, without any cleverness: the oracles."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 2.2e-16


def iic(logits_a: Tensor, logits_b: Tensor, entropy_weight: float = 1.0, prior: Tensor | None = None) -> Tensor:
    """Ji et al.: of each sub-head the N x K x K outer products, summed, symmetric, normalised; (H,) losses.

    `logits_b` may hold R second views, repeat-major; the published code runs R copies of the first view. With a prior
    (not in the paper) the marginal entropy H(p), which counts 2w - 1 times, becomes ln K - KL(p || prior).
    """
    repeats = len(logits_b) // len(logits_a)
    losses = []
    for h in range(logits_a.shape[1]):
        z, z_other = logits_a[:, h].softmax(1).repeat(repeats, 1), logits_b[:, h].softmax(1)
        loss = _iic_of_one(z, z_other, entropy_weight)
        if prior is not None:
            p = torch.cat([z, z_other]).mean(0)
            entropy, divergence = -(p * p.log()).sum(), (p * (p / (prior / prior.sum())).log()).sum()
            loss = loss + (2 * entropy_weight - 1) * (entropy - math.log(len(p)) + divergence)
        losses.append(loss)
    return torch.stack(losses)


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
