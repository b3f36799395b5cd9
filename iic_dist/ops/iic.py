"""The three steps of the IIC loss on one rank: joint of a batch, information terms, gradient of the logits.

The functions here are plain PyTorch and have the signatures of the native ops in csrc/library.cpp;
`implementation` gives either. The collective stands between the first two steps, in `iic_dist.losses`.
Source: Ji et al., Invariant Information Clustering, ICCV 2019, equations 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from iic_dist.ops import backend

EPS = 2.2e-16
"""Floor of a probability before its logarithm: float64's machine epsilon, as in the published code."""


class BatchJoint(NamedTuple):
    """What the first step leaves: the unnormalised joint and what the backward pass needs of the softmax.

    Attributes:
        sums: (H*K*K + 1,), M = sum_i z_i (sum_r z'_ri)^T over the rows of this rank for every sub-head, and
            last the number of pairs: one buffer for one all-reduce.
        probs_a: softmax of the first view; here (N, H, K) or (H, K, N), native ops have layouts of their own.
        probs_b: softmax of the second views, with the repeats in front.
    """

    sums: Tensor
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
        joint_grad: (H, K, K), d loss / dM up to constants that the softmax removes.
    """

    loss: Tensor
    mutual_information: Tensor
    entropy: Tensor
    conditional_entropy: Tensor
    joint: Tensor
    joint_grad: Tensor


SHORT_ROW = 16
"""Below it torch's CPU softmax over the last dimension is not vectorised, and the batch goes last: at
1024 x 10 the whole step is 5 times faster that way, at K = 16 it is 1.5 times slower."""


def _softmax(logits: Tensor) -> Tensor:
    """softmax over clusters of (..., N, H, K) in at least float32; for short rows as (..., H, K, N)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.shape[-1] >= SHORT_ROW:
        return torch.softmax(logits, -1, dtype=dtype)
    order = (*range(logits.dim() - 3), -2, -1, -3)
    return torch.softmax(logits.permute(order).to(dtype, memory_format=torch.contiguous_format), dim=-2)


def _columns(probs: Tensor, num_clusters: int) -> Tensor:
    """What `_softmax` gave for one view, as (H, K, N)."""
    return probs.permute(1, 2, 0) if num_clusters >= SHORT_ROW else probs


def _sum_repeats(probs_b: Tensor) -> Tensor:
    return probs_b[0] if probs_b.shape[0] == 1 else probs_b.sum(0)


def iic_joint(logits_a: Tensor, logits_b: Tensor) -> BatchJoint:
    """Sum the outer products of the assignments of both views over the batch.

    Args:
        logits_a: (N, H, K), first view, floating point.
        logits_b: (R*N, H, K), second views; repeat r of sample i stands in row r*N + i.
    """
    n, h, k = logits_a.shape
    probs_a = _softmax(logits_a)
    probs_b = _softmax(logits_b.reshape(-1, n, h, k))
    joint_sum = _columns(probs_a, k) @ _columns(_sum_repeats(probs_b), k).transpose(1, 2)
    num_pairs = joint_sum.new_full((1,), logits_b.shape[0])
    return BatchJoint(torch.cat([joint_sum.flatten(), num_pairs]), probs_a, probs_b)


def iic_information(sums: Tensor, num_clusters: int, entropy_weight: float) -> Information:
    """Turn the (reduced) sums of outer products into the terms of the loss and its gradient.

        P = (M + M^T) / 2T;  A = ln P - w (ln p_row + ln p_col);  loss = -sum P A;  d loss / dM = -A / T

    Args:
        sums: (H*K*K + 1,), M of every sub-head and the number T of pairs, over all ranks.
        num_clusters: K.
        entropy_weight: w; 1 makes the loss minus the mutual information.
    """
    joint_sum, num_pairs = sums[:-1].view(-1, num_clusters, num_clusters), sums[-1]
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


def towards_prior(terms: Information, num_pairs: Tensor, prior: Tensor, entropy_weight: float) -> Information:
    """Turn the push towards clusters of equal size into one towards given sizes; the same for either implementation.

        loss = H(z | z') + (2w - 1) (KL(p || prior) - ln K);  A gains (w - 1/2) (ln K prior_row + ln K prior_col)

    With equal sizes nothing changes, because KL(p || 1 / K) = ln K - H(p). The new term is linear in P, so its gradient
    is exact.

    Args:
        terms: What `iic_information` gave for w.
        num_pairs: (), T.
        prior: (K,), relative sizes above 0.
        entropy_weight: w.
    """
    log_prior = (prior.double() / prior.double().mean()).log().to(terms.joint)
    push = (entropy_weight - 0.5) * (log_prior.unsqueeze(1) + log_prior)
    return terms._replace(
        loss=terms.loss - (terms.joint * push).sum((1, 2)), joint_grad=terms.joint_grad - push / num_pairs
    )


def _softmax_backward(probs: Tensor, grad: Tensor, like: Tensor) -> Tensor:
    """z * (g - <z, g>) for what `_softmax` gave and the gradient of that, in the shape of `like`."""
    if like.shape[-1] >= SHORT_ROW:
        grad_logits = torch._softmax_backward_data(grad.expand_as(probs), probs, -1, probs.dtype)
    else:
        grad_columns = probs * (grad - (probs * grad).sum(-2, keepdim=True))
        grad_logits = grad_columns.permute(*range(probs.dim() - 3), -1, -3, -2)
    return grad_logits.reshape(like.shape).to(like.dtype)


def _product(joint_grad: Tensor, probs: Tensor) -> Tensor:
    """G z of every sample, in the shape of `probs`: one view as `_softmax` gave it."""
    if joint_grad.shape[-1] < SHORT_ROW:
        return joint_grad @ probs
    return (probs.transpose(0, 1) @ joint_grad).transpose(0, 1)


def iic_logits_grad(
    logits_a: Tensor,
    logits_b: Tensor,
    probs_a: Tensor,
    probs_b: Tensor,
    joint_grad: Tensor,
    grad_loss: Tensor,
) -> tuple[Tensor, Tensor]:
    """Carry the gradient of the joint back to the logits of both views.

        g_i = G (sum_r z'_ri),  g'_ri = G z_i,  dlogits = z * (g - <z, g>)

    Args:
        logits_a: (N, H, K); only its shape and dtype are read.
        logits_b: (R*N, H, K); likewise.
        probs_a: what `iic_joint` kept of them.
        probs_b: likewise.
        joint_grad: (H, K, K), symmetric.
        grad_loss: (H,), the gradient of each sub-head's loss, times the number of ranks.

    Returns:
        The gradients, contiguous, in the shapes and dtypes of the logits.
    """
    scaled = joint_grad * grad_loss.view(-1, 1, 1)
    grad_a, grad_b = _product(scaled, _sum_repeats(probs_b)), _product(scaled, probs_a)
    return _softmax_backward(probs_a, grad_a, logits_a), _softmax_backward(probs_b, grad_b, logits_b)


class Implementation(NamedTuple):
    """The three steps, by one implementation."""

    iic_joint: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    iic_information: Callable[[Tensor, int, float], tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
    iic_logits_grad: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _load_fused() -> Implementation:
    """Give the native ops, with their shapes made known to torch.compile."""
    ops = torch.ops.iic_dist
    torch.library.register_fake("iic_dist::iic_joint", _fake_joint)
    torch.library.register_fake("iic_dist::iic_information", _fake_information)
    torch.library.register_fake("iic_dist::iic_logits_grad", _fake_logits_grad)
    names = Implementation._fields
    return Implementation(*(getattr(ops, name).default for name in names))


def _fake_joint(logits_a: Tensor, logits_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, h, k = logits_a.shape
    dtype = torch.promote_types(logits_a.dtype, torch.float32)
    sums = logits_a.new_empty(h * k * k + 1, dtype=dtype)
    if logits_a.device.type == "cpu":  # panels of 64 samples: csrc/cpu/iic_kernels.h
        panels = (h, (n + 63) // 64, k, 64)
        probs_a = logits_a.new_empty(panels, dtype=dtype)
        return sums, probs_a, logits_a.new_empty((logits_b.shape[0] // n, *panels), dtype=dtype)
    if k <= 160 and logits_a.dtype != torch.float64:  # nothing: csrc/cuda/iic_cuda.cu
        return sums, sums.new_empty(0), sums.new_empty(0)
    operand = torch.bfloat16 if logits_a.dtype == torch.float16 else logits_a.dtype
    probs_a = logits_a.new_empty(logits_a.shape, dtype=operand)
    return sums, probs_a, torch.empty_like(probs_a)


def _fake_information(
    sums: Tensor, num_clusters: int, entropy_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_heads = (sums.shape[0] - 1) // (num_clusters * num_clusters)
    loss, information, entropy, conditional = (sums.new_empty(num_heads) for _ in range(4))
    joint = sums.new_empty(num_heads, num_clusters, num_clusters)
    return loss, information, entropy, conditional, joint, torch.empty_like(joint)


def _fake_logits_grad(
    logits_a: Tensor,
    logits_b: Tensor,
    probs_a: Tensor,
    probs_b: Tensor,
    joint_grad: Tensor,
    grad_loss: Tensor,
) -> tuple[Tensor, Tensor]:
    return logits_a.new_empty(logits_a.shape), logits_b.new_empty(logits_b.shape)


TORCH = Implementation(iic_joint, iic_information, iic_logits_grad)
FUSED = _load_fused() if backend.WHY_NOT_FUSED is None else None
_CHOSEN: dict[tuple[str, str], Implementation] = {}


def implementation(impl: str, device: torch.device) -> Implementation:
    """Resolve `impl` ("auto", "fused" or "torch") for tensors on `device`; see `backend.choose`."""
    chosen = _CHOSEN.get((impl, device.type))
    if chosen is None:
        fused = backend.choose(impl, device.type) == "fused"
        chosen = _CHOSEN[impl, device.type] = FUSED if FUSED is not None and fused else TORCH
    return chosen
