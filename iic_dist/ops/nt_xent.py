"""The two steps of NT-Xent on one rank: log-sum-exp of its rows, gradient of its rows.

The functions here are plain PyTorch and have the signatures of the native ops in csrc/library.cpp;
`implementation` gives either. Both walk over blocks of rows, so that no 2G x 2G matrix exists. On CUDA the native ops
are kernels of their own for rows of up to 1 KiB (D <= 512 in bfloat16 and float16, D <= 256 in float32); longer rows
and float64 go through the library's products, block by block (csrc/cuda/nt_xent_cuda.cu). The collectives stand in
`iic_dist.losses`.
Source: Chen et al., SimCLR, ICML 2020, equation 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iic_dist.ops import backend

BLOCK_ELEMENTS = 1 << 21
"""Similarities held at once: 8 MiB in float32, and larger blocks are not faster on a CPU."""


def _blocks(num_rows: int, num_columns: int) -> Iterator[tuple[int, int]]:
    rows = max(1, BLOCK_ELEMENTS // num_columns)
    for start in range(0, num_rows, rows):
        yield start, min(start + rows, num_rows)


def nt_xent_rows(z: Tensor, first_row: int, num_rows: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute lse_{j != i} s_ij and s_i,pos(i) with s = z z^T / temperature, for the rows of this rank.

    Args:
        z: (2G, D), unit rows of all ranks; each rank's own stand together as [a; b].
        first_row: where this rank's rows begin.
        num_rows: 2N, how many they are.
        temperature: > 0.

    Returns:
        (2N,) log-sum-exps and (2N,) similarities of the positive pairs, both divided by the temperature.
    """
    own = z[first_row : first_row + num_rows]
    log_sum_exp = own.new_empty(num_rows)
    for start, stop in _blocks(num_rows, z.shape[0]):
        similarity = (own[start:stop] / temperature) @ z.T
        similarity.diagonal(first_row + start).fill_(float("-inf"))
        log_sum_exp[start:stop] = torch.logsumexp(similarity, 1)
    a, b = own.chunk(2)
    positive = (a * b).sum(1) / temperature
    return log_sum_exp, torch.cat([positive, positive])


def nt_xent_rows_grad(z: Tensor, log_sum_exp: Tensor, first_row: int, num_rows: int, temperature: float) -> Tensor:
    """Compute the gradient of the mean loss with respect to the unit rows of this rank.

        dz_i = 1 / (2G temperature) * [sum_{j != i} (p_ij + p_ji) z_j - 2 z_pos(i)]

    Args:
        z: (2G, D), as in `nt_xent_rows`.
        log_sum_exp: (2G,), of all ranks' rows.
        first_row: where this rank's rows begin.
        num_rows: 2N, how many they are.
        temperature: > 0.

    Returns:
        (2N, D).
    """
    own = z[first_row : first_row + num_rows]
    own_log_sum_exp = log_sum_exp[first_row : first_row + num_rows]
    a, b = own.chunk(2)
    grad = torch.cat([b, a]).mul_(-2)
    for start, stop in _blocks(num_rows, z.shape[0]):
        similarity = (own[start:stop] / temperature) @ z.T
        similarity.diagonal(first_row + start).fill_(float("-inf"))
        weight = (similarity - own_log_sum_exp[start:stop, None]).exp_()
        weight += similarity.sub_(log_sum_exp).exp_()
        grad[start:stop].addmm_(weight, z)
    return grad.div_(z.shape[0] * temperature)


class Implementation(NamedTuple):
    """The two steps, by one implementation."""

    nt_xent_rows: Callable[[Tensor, int, int, float], tuple[Tensor, Tensor]]
    nt_xent_rows_grad: Callable[[Tensor, Tensor, int, int, float], Tensor]


def _load_fused() -> Implementation:
    """Give the native ops, with their shapes made known to torch.compile."""
    ops = torch.ops.iic_dist
    torch.library.register_fake("iic_dist::nt_xent_rows", _fake_rows)
    torch.library.register_fake("iic_dist::nt_xent_rows_grad", _fake_rows_grad)
    return Implementation(ops.nt_xent_rows.default, ops.nt_xent_rows_grad.default)


def _fake_rows(z: Tensor, first_row: int, num_rows: int, temperature: float) -> tuple[Tensor, Tensor]:
    log_sum_exp = z.new_empty(num_rows, dtype=_accumulator(z))
    return log_sum_exp, torch.empty_like(log_sum_exp)


def _fake_rows_grad(z: Tensor, log_sum_exp: Tensor, first_row: int, num_rows: int, temperature: float) -> Tensor:
    return z.new_empty(num_rows, z.shape[1], dtype=_accumulator(z))


def _accumulator(embeddings: Tensor) -> torch.dtype:
    return torch.promote_types(embeddings.dtype, torch.float32)


TORCH = Implementation(nt_xent_rows, nt_xent_rows_grad)
DEVICES = backend.devices_of("nt_xent_rows", "nt_xent_rows_grad")
"""The device types of the native ops: none of an extension that is older than they are."""
FUSED = _load_fused() if DEVICES else None


def implementation(impl: str, device: torch.device) -> Implementation:
    """Resolve `impl` ("auto", "fused" or "torch") for tensors on `device`; see `backend.choose`."""
    chosen = backend.choose(impl, device.type, DEVICES, "nt_xent")
    return FUSED if FUSED is not None and chosen == "fused" else TORCH


def operand_dtype(ops: Implementation, embeddings: Tensor) -> torch.dtype:
    """Return the dtype in which `ops` takes these embeddings.

    The CUDA kernels multiply bfloat16 and float16 as they are; everything else wants at least float32.
    """
    if ops is FUSED and embeddings.device.type == "cuda":
        return embeddings.dtype
    return _accumulator(embeddings)
