"""The IIC loss of the global batch: local joint -> all-reduce -> information."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from iic_dist import distributed
from iic_dist.ops import iic


class IICTerms(NamedTuple):
    """The IIC loss of every sub-head and its parts, in nats; only `loss` carries a gradient.

    Attributes:
        loss: (H,); with entropy_weight 1 minus the mutual information, in [-ln K, 0].
        mutual_information: (H,), in [0, ln K].
        entropy: (H,), of the marginal; ln K where all clusters are used alike.
        conditional_entropy: (H,), of one view's cluster given the other's; 0 where both agree with certainty.
        joint: (H, K, K), symmetric, sums to one.
    """

    loss: Tensor
    mutual_information: Tensor
    entropy: Tensor
    conditional_entropy: Tensor
    joint: Tensor


class _IICLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_a: Tensor,
        logits_b: Tensor,
        entropy_weight: float,
        prior: Tensor | None,
        group: dist.ProcessGroup | None,
        ops: iic.Implementation,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(logits_a.device.type, enabled=False):  # it would round the joint's products
            sums, probs_a, probs_b = ops.iic_joint(logits_a, logits_b)
            distributed.all_reduce_sum(sums, group)
            information = iic.Information(*ops.iic_information(sums, logits_a.shape[2], entropy_weight))
            if prior is not None:
                information = iic.towards_prior(information, sums[-1], prior, entropy_weight)
            *terms, joint_grad = information
        ctx.ops, ctx.world_size = ops, distributed.world_size(group)
        ctx.save_for_backward(logits_a, logits_b, probs_a, probs_b, joint_grad)
        ctx.mark_non_differentiable(*terms[1:])
        ctx.set_materialize_grads(False)  # else the joint's would be a matrix of zeros
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        if grad_loss is None:
            return None, None, None, None, None, None
        if ctx.world_size > 1:
            grad_loss = grad_loss * ctx.world_size
        with torch.autocast(grad_loss.device.type, enabled=False):
            return *ctx.ops.iic_logits_grad(*ctx.saved_tensors, grad_loss), None, None, None, None


def iic_loss(
    logits_a: Tensor,
    logits_b: Tensor,
    *,
    entropy_weight: float = 1.0,
    prior: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> IICTerms:
    """Compute the IIC loss of every sub-head over the global batch.

        P = mean over pairs of z z'^T, made symmetric;  loss = -sum P (ln P - w (ln p_row + ln p_col))

    Args:
        logits_a: (N, H, K), float64, float32, bfloat16 or float16: the first view of N images, H sub-heads.
        logits_b: (R*N, H, K), same dtype: R second views; repeat r of image i stands in row r*N + i.
        entropy_weight: w > 0; above 1 it pushes harder towards clusters of equal size.
        prior: (K,) on the device of the logits, relative sizes above 0 to push towards instead of equal ones: the
            marginal entropy H(p) in the loss, which counts 2w - 1 times, becomes ln K - KL(p || prior).
        group: the ranks that share the batch; the default group if there is one.
        impl: "auto", "fused" (raises if the extension is not there) or "torch".

    Returns:
        IICTerms in at least float32; `loss.sum()` or `.mean()` is what to differentiate.

    Raises:
        ValueError: shapes or dtypes do not fit; the message quotes them.

    Collective: all ranks must call; reduces H*K*K + 1 floats. None in the backward pass.
    Source: Ji et al., ICCV 2019, equations 2, 3 and section 3.3 (w = lambda of the published code).
    """
    ops = iic.implementation(impl, logits_a.device)
    _check_logits(logits_a, logits_b)
    if prior is not None and prior.shape != logits_a.shape[2:]:
        raise ValueError(f"prior {tuple(prior.shape)} for {logits_a.shape[2]} clusters: must be (K,)")
    return IICTerms(*_IICLoss.apply(logits_a, logits_b, float(entropy_weight), prior, group, ops))


def _check_logits(logits_a: Tensor, logits_b: Tensor) -> None:
    a, b = logits_a.shape, logits_b.shape
    if len(a) != 3 or len(b) != 3 or a[1:] != b[1:]:
        raise ValueError(f"{_shapes(logits_a, logits_b)}: must be (N, H, K) and (R*N, H, K)")
    if logits_a.numel() == 0 or logits_b.numel() == 0:
        raise ValueError(
            f"{_shapes(logits_a, logits_b)}: an empty batch has no joint; give every rank at least one pair"
        )
    if b[0] % a[0]:
        raise ValueError(f"{_shapes(logits_a, logits_b)}: the second views must be a whole multiple of the first ones")
    if logits_a.dtype != logits_b.dtype or not logits_a.is_floating_point():
        raise ValueError(f"logits of {logits_a.dtype} and {logits_b.dtype}: must be of one floating dtype")
    if logits_a.device != logits_b.device:
        raise ValueError(f"logits on {logits_a.device} and {logits_b.device}: must be on one device")


def _shapes(logits_a: Tensor, logits_b: Tensor) -> str:
    """Only for messages: to write it takes three times as long as to check."""
    return f"logits_a {tuple(logits_a.shape)} and logits_b {tuple(logits_b.shape)}"
