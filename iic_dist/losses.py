"""The losses of the global batch: local part -> collective -> op.

Both return the value of the whole batch of all ranks on every rank. DDP averages gradients over the W ranks,
so each local gradient carries a factor W: the average is the gradient of the global loss, for any shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from iic_dist import distributed
from iic_dist.ops import iic, nt_xent

SMALLEST_NORM = 1e-12
"""An embedding is divided by no less, as in torch.nn.functional.normalize: one of zeros stays so."""
LONGEST_SUM = 1 << 13
"""Values that PyTorch adds in one order whatever the number of threads."""
BLOCK_ELEMENTS = 1 << 19
"""Products of two embeddings held at once: 2 MiB in float32."""


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


class _NTXentLoss(torch.autograd.Function):
    """From the embeddings, of which the normalised rows of all ranks and their own norms are known already.

    Normalisation belongs to it: autograd would keep and make four more copies of the embeddings.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings_a: Tensor,
        embeddings_b: Tensor,
        z: Tensor,
        norm: Tensor,
        sizes: Sequence[int],
        temperature: float,
        group: dist.ProcessGroup | None,
        ops: nt_xent.Implementation,
    ) -> Tensor:
        ctx.place = (sum(sizes[: distributed.rank(group)]), norm.shape[0], temperature)
        with torch.autocast(z.device.type, enabled=False):
            rows = ops.nt_xent_rows(z, *ctx.place)
        log_sum_exp, positive = distributed.gather_rows(torch.stack(rows, 1), sizes, group).unbind(1)
        ctx.save_for_backward(z, log_sum_exp, norm)
        ctx.ops, ctx.dtype, ctx.world_size = ops, embeddings_a.dtype, distributed.world_size(group)
        return _mean(log_sum_exp - positive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, log_sum_exp, norm = ctx.saved_tensors
        first_row, num_rows, _ = ctx.place
        with torch.autocast(z.device.type, enabled=False):
            grad = ctx.ops.nt_xent_rows_grad(z, log_sum_exp, *ctx.place)
            own = z[first_row : first_row + num_rows].to(grad.dtype)
            radial = _row_products(own, grad)
        grad.addcmul_(own, radial, value=-1).mul_(grads[0] * ctx.world_size / norm)
        del own
        return *grad.to(ctx.dtype).chunk(2), None, None, None, None, None, None


def _mean(values: Tensor) -> Tensor:
    """Take the mean of a vector, added in an order that its length alone sets.

    PyTorch shares a sum of 32768 values or more between its threads: as many partial sums as there are threads.
    """
    if len(values) <= LONGEST_SUM:
        return values.mean()
    rows = F.pad(values, (0, -len(values) % LONGEST_SUM)).view(-1, LONGEST_SUM)
    return rows.sum(1).sum() / len(values)


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Multiply each row of (2N, D) with its like, into (2N, 1), a block at a time: the copy in between stays small.

    torch.bmm hands rows of 400 values or more to a library, whose order of addition is its own affair.
    """
    rows = max(1, BLOCK_ELEMENTS // left.shape[1])
    products = [torch.linalg.vecdot(*block) for block in zip(left.split(rows), right.split(rows), strict=True)]
    return torch.cat(products).unsqueeze(1)


def nt_xent_loss(
    embeddings_a: Tensor,
    embeddings_b: Tensor,
    *,
    temperature: float = 0.5,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Compute the NT-Xent loss of the global batch: every embedding against the 2G - 1 others.

        loss = mean_i [ logsumexp_{j != i}(s_ij) - s_i,pos(i) ],  s = cosine similarity / temperature

    Args:
        embeddings_a: (N, D), floating point, of any norm: the first view of N images.
        embeddings_b: (N, D), same dtype: the second view.
        temperature: > 0.
        group: the ranks that share the batch; the default group if there is one.
        impl: "auto", "fused" (raises if the extension is not there) or "torch". The fused loss on CUDA multiplies
            bfloat16 and float16 embeddings, once normalised, in that dtype, and sums in float32; the others in
            float32.
        shard_sizes: N of every rank in rank order, where the caller knows it; None asks the ranks, which
            costs a round trip on the host.

    Returns:
        (), in at least float32; ln(2G - 1) where all embeddings are the same.

    Raises:
        ValueError: shapes, dtypes or temperature do not fit, or the global batch has a single image.

    Collective: all ranks must call; gathers 2G x D values and 2G x 2 floats. None in the backward pass.
    Source: Chen et al., ICML 2020, equation 1.
    """
    finish = start_nt_xent_loss(
        embeddings_a, embeddings_b, temperature=temperature, group=group, impl=impl, shard_sizes=shard_sizes
    )
    return finish()


def start_nt_xent_loss(
    embeddings_a: Tensor,
    embeddings_b: Tensor,
    *,
    temperature: float = 0.5,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
    shard_sizes: Sequence[int] | None = None,
) -> Callable[[], Tensor]:
    """Start the gather of `nt_xent_loss`, which explains the arguments, and return what computes the rest.

    Other work fits in between, other losses above all. On CUDA only the stream waits for the gather.

    Collective: all ranks must call, and call what is returned, in the same order among their collectives.
    """
    ops = nt_xent.implementation(impl, embeddings_a.device)
    _check_embeddings(embeddings_a, embeddings_b, temperature)
    sizes = list(shard_sizes or distributed.gather_sizes(embeddings_a.shape[0], group))
    if sum(sizes) < 2:
        raise ValueError("a global batch of 1 image has no negatives: give at least 2 images over all ranks")
    rows = [2 * size for size in sizes]
    with torch.no_grad():
        own = torch.cat([embeddings_a, embeddings_b])
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        norm = torch.linalg.vector_norm(own, dim=1, keepdim=True).clamp_min_(SMALLEST_NORM)
        own = own.div_(norm).to(nt_xent.operand_dtype(ops, embeddings_a))
    gathered = distributed.start_gather_rows(own, rows, group)

    def finish() -> Tensor:
        z = gathered()
        loss: Tensor = _NTXentLoss.apply(embeddings_a, embeddings_b, z, norm, rows, float(temperature), group, ops)
        return loss

    return finish


def _check_embeddings(embeddings_a: Tensor, embeddings_b: Tensor, temperature: float) -> None:
    shapes = f"embeddings_a {tuple(embeddings_a.shape)} and embeddings_b {tuple(embeddings_b.shape)}"
    if embeddings_a.dim() != 2 or embeddings_a.shape != embeddings_b.shape:
        raise ValueError(f"{shapes}: must both be (N, D)")
    if embeddings_a.numel() == 0:
        raise ValueError(f"{shapes}: an empty batch has no pairs; give every rank at least one")
    if embeddings_a.dtype != embeddings_b.dtype or not embeddings_a.is_floating_point():
        raise ValueError(f"embeddings of {embeddings_a.dtype} and {embeddings_b.dtype}: must be of one floating dtype")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
