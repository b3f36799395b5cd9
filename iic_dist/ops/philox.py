"""Counter-based random numbers: a pure function of what is drawn, never of who draws it.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer arithmetic,
so the values are the same on every device. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

# A word of the counter: a tensor, or one Python int where every element would be the same.
Word = Tensor | int

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# The "view" of the epoch's permutation; views count up from 0 and never get here.
_PERMUTATION = _MASK


def _philox(c0: Word, c1: Word, c2: Word, c3: Word, key: tuple[int, int]) -> Tensor:
    """The ten rounds on four words that broadcast against each other; at least c0 and c3 are tensors."""
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product needs 64 bits: int64 wraps, but keeps all of them; the mask undoes the signed shift.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ (c1 ^ k0),
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ (c3 ^ k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    # Each word has met each other by now, so all are tensors of the common shape.
    return torch.stack(cast(tuple[Tensor, ...], (c0, c1, c2, c3)), dim=-1)


def _key(seed: int) -> tuple[int, int]:
    return seed & _MASK, (seed >> 32) & _MASK


def philox_4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Encrypt counters with Philox-4x32-10.

    Args:
        counter: (..., 4) int64, each word in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        (..., 4) int64, each word uniform in [0, 2^32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    return _philox(c0, c1, c2, c3, key)


def uniforms(seed: int, epoch: int, indices: Tensor, view: int | Tensor, count: int) -> Tensor:
    """Draw `count` uniform numbers for each image index.

    The key is the seed (low and high 32 bits), the counter (index, epoch, view, block); block b gives the
    numbers 4b to 4b + 3. A number depends on nothing else, in particular not on the other indices.

    Args:
        seed: any int; its low 64 bits count.
        epoch: the epoch, in [0, 2^32).
        indices: (...) int64, index of each image in its data set, in [0, 2^32).
        view: number of the view, or an int64 tensor that broadcasts against `indices`.
        count: numbers wanted per index.

    Returns:
        (..., count) float32 in [0, 1), multiples of 2^-24, on `indices.device`.
    """
    block = torch.arange((count + 3) // 4, device=indices.device)
    view = view.unsqueeze(-1) if isinstance(view, Tensor) else view & _MASK
    words = _philox(indices.unsqueeze(-1), epoch & _MASK, view, block, _key(seed))
    return (words.flatten(-2)[..., :count] >> 8).to(torch.float32) * 2.0**-24


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """Shuffle 0..n-1 for an epoch.

    Returns:
        (n,) int64 on the CPU: the order that sorts 63-bit keys drawn for each index; ties keep their order.
    """
    counter = torch.zeros(n, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(n)
    counter[:, 1] = epoch & _MASK
    counter[:, 2] = _PERMUTATION
    words = philox_4x32(counter, _key(seed))
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)
