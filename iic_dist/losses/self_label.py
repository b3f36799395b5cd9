"""Cross-entropy of a strong view towards the cluster that the image itself surely has, over the global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from iic_dist import distributed


def self_label_loss(
    logits: Tensor, strong: Tensor, *, confidence: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute the loss of every sub-head; each cluster counts the same, however many images are sure of it.

        loss = mean over clusters c with sure images of (mean over images i that are sure of c of -ln q_i(c))

    with q the softmax of `strong`, and an image sure of c where the softmax of `logits` says c with more than
    `confidence`. 0 where no image of the global batch is sure.

    Args:
        logits: (N, H, K), floating point, of the image itself; no gradient goes there.
        strong: (N, H, K), of a strong view of it.
        confidence: In (0, 1).
        group: the ranks that share the batch; the default group if there is one.

    Returns:
        (H,) in at least float32, at least 0, the value of the global batch on every rank. The local gradient carries a
        factor W: averaged over the ranks it is the gradient of the global loss.

    Collective: all ranks must call; reduces H*K + H floats. None in the backward pass.
    Source: Van Gansbeke et al., ECCV 2020, section 2.3 (self-labelling, weighted by class).
    """
    dtype = torch.promote_types(strong.dtype, torch.float32)
    sureness, labels = torch.softmax(logits.detach().to(dtype), -1).max(-1)  # (N, H)
    sure = (sureness > confidence).to(dtype)
    counts = (functional.one_hot(labels, logits.shape[2]).to(dtype) * sure.unsqueeze(-1)).sum(0)
    distributed.all_reduce_sum(counts, group)
    present = (counts > 0).sum(1).clamp_min(1)  # (H,)
    weight = sure / (counts.gather(1, labels.T).T.clamp_min(1) * present)
    surprise = -torch.log_softmax(strong.to(dtype), -1).gather(2, labels.unsqueeze(-1)).squeeze(-1)
    local = (weight * surprise).sum(0) * distributed.world_size(group)
    value = distributed.all_reduce_sum(local.detach().clone(), group) / distributed.world_size(group)
    return local + (value - local.detach())
