"""The three steps of the IIC loss on one rank: joint of a batch, information terms, gradient of the logits.

The collective stands between the first and the second step, in `iic_dist.losses`.
Source: Ji et al., Invariant Information Clustering, ICCV 2019, equations 2 and 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 2.2e-16
"""Floor of a probability before its logarithm: float64's machine epsilon, as in the published code."""


class BatchJoint(NamedTuple):
    """What the first step leaves: the unnormalised joint and what the backward pass needs of the softmax.

    Attributes:
        joint_sum: (H, K, K), sum_i z_i (sum_r z'_ri)^T over the rows of this rank.
        probs_a: (H, K, N), softmax of the first view.
        probs_b: (R, H, K, N), softmax of the second views.
    """

    joint_sum: Tensor
    probs_a: Tensor
    probs_b: Tensor


class Information(NamedTuple):
    """What the second step leaves: the terms of every sub-head and the gradient of the loss.

    Attributes:
        loss: (H,), nats.
        mutual_information: (H,), nats, in [0, ln K].
        entropy: (H,), nats, of the marginal.
        conditional_entropy: (H,), nats, entropy of one view's cluster given the other's.
        joint: (H, K, K), symmetric, sums to one.
        joint_grad: (H, K, K), d loss / d joint_sum up to constants that the softmax removes.
    """

    loss: Tensor
    mutual_information: Tensor
    entropy: Tensor
    conditional_entropy: Tensor
    joint: Tensor
    joint_grad: Tensor


def _softmax_columns(logits: Tensor) -> Tensor:
    """softmax over clusters of (..., N, H, K) as (..., H, K, N), in at least float32.

    The batch goes last because torch's CPU softmax over a short last dimension is not vectorised.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    order = (*range(logits.dim() - 3), -2, -1, -3)
    return torch.softmax(logits.permute(order).to(dtype, memory_format=torch.contiguous_format), dim=-2)


def iic_joint(logits_a: Tensor, logits_b: Tensor) -> BatchJoint:
    """Sum the outer products of the assignments of both views over the batch.

    Args:
        logits_a: (N, H, K), first view, floating point.
        logits_b: (R*N, H, K), second views; repeat r of sample i stands in row r*N + i.
    """
    n, h, k = logits_a.shape
    probs_a = _softmax_columns(logits_a)
    probs_b = _softmax_columns(logits_b.reshape(-1, n, h, k))
    return BatchJoint(probs_a @ probs_b.sum(0).transpose(1, 2), probs_a, probs_b)


def iic_information(joint_sum: Tensor, num_pairs: Tensor, entropy_weight: float) -> Information:
    """Turn the (reduced) sum of outer products into the terms of the loss and its gradient.

        P = (M + M^T) / 2T;  A = ln P - w (ln p_row + ln p_col);  loss = -sum P A;  d loss / dM = -A / T

    Args:
        joint_sum: (H, K, K), sum over all pairs of all ranks.
        num_pairs: (), the number T of those pairs, same dtype.
        entropy_weight: w; 1 makes the loss minus the mutual information.
    """
    symmetric = (joint_sum + joint_sum.transpose(1, 2)) / (2 * num_pairs)
    joint = symmetric.clamp_min(EPS)
    marginal = symmetric.sum(2).clamp_min(EPS)
    log_joint, log_marginal = joint.log(), marginal.log()
    independent = log_marginal.unsqueeze(2) + log_marginal.unsqueeze(1)
    score = log_joint - entropy_weight * independent
    entropy = -(marginal * log_marginal).sum(1)
    mutual_information = (joint * (log_joint - independent)).sum((1, 2))
    return Information(
        loss=-(joint * score).sum((1, 2)),
        mutual_information=mutual_information,
        entropy=entropy,
        conditional_entropy=entropy - mutual_information,
        joint=joint,
        joint_grad=-score / num_pairs,
    )


def _softmax_backward(probs: Tensor, grad: Tensor, like: Tensor) -> Tensor:
    """z * (g - <z, g>) for (..., H, K, N), returned as (rows, H, K) in the dtype of `like`."""
    grad_logits = probs * (grad - (probs * grad).sum(-2, keepdim=True))
    order = (*range(probs.dim() - 3), -1, -3, -2)
    return grad_logits.permute(order).reshape(like.shape).to(like.dtype)


def iic_logits_grad(logits_a: Tensor, logits_b: Tensor, kept: BatchJoint, joint_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the gradient of the joint back to the logits of both views.

        g_i = G (sum_r z'_ri),  g'_ri = G z_i,  dlogits = z * (g - <z, g>)

    Args:
        logits_a: (N, H, K); only its shape and dtype are read.
        logits_b: (R*N, H, K); likewise.
        kept: what `iic_joint` returned for them.
        joint_grad: (H, K, K), symmetric, scaled by the gradient of each sub-head's loss.

    Returns:
        The gradients, in the shapes and dtypes of the logits.
    """
    grad_a = joint_grad @ kept.probs_b.sum(0)
    grad_b = joint_grad @ kept.probs_a
    return _softmax_backward(kept.probs_a, grad_a, logits_a), _softmax_backward(kept.probs_b, grad_b, logits_b)
