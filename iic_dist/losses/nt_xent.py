"""The NT-Xent loss of the global batch: gather -> log-sum-exp -> gather."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from iic_dist import distributed
from iic_dist.ops import nt_xent

SMALLEST_NORM = 1e-12
"""An embedding is divided by no less, as in torch.nn.functional.normalize: one of zeros stays so."""
LONGEST_SUM = 1 << 13
"""Values that PyTorch adds in one order whatever the number of threads."""
BLOCK_ELEMENTS = 1 << 19
"""Products of two embeddings held at once: 2 MiB in float32."""


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
        (), in at least float32; ln(2G - 1) where all embeddings are the same, and so 0 for a single image.

    Raises:
        ValueError: shapes, dtypes or temperature do not fit.

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
    if sum(sizes) == 1:
        return lambda: _nothing_to_tell_apart(embeddings_a, embeddings_b)
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


def _nothing_to_tell_apart(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    """Return ln 1 = 0 for the one pair of a batch, with a gradient of 0; what is not finite stays so."""
    both = torch.cat([embeddings_a, embeddings_b])
    return (both.to(torch.promote_types(both.dtype, torch.float32)) * 0).sum()


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
