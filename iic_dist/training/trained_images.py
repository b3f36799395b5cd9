"""Which images or features a run has been trained on: kept in its checkpoints, compared before it goes on."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iic_dist import distributed
from iic_dist.config.build import RunData
from iic_dist.data.features import FeatureSet, blocks
from iic_dist.data.image_set import ImageSet
from iic_dist.errors import UsageError
from iic_dist.ops.philox import uniforms
from iic_dist.training.features import RunFeatures

_SKETCH = 8
"""Numbers by which the features of an image are known again."""
_NEAR = 0.05
"""Difference of such a number that another device or another batch can make; it is about that of the unit vectors."""


@dataclass(frozen=True)
class Difference:
    """How many images were added, are gone, and have changed; a renamed one is one of each of the first two."""

    added: int
    gone: int
    changed: int

    def __bool__(self) -> bool:
        return bool(self.added or self.gone or self.changed)

    def __str__(self) -> str:
        return f"{self.added} added, {self.gone} gone, {self.changed} changed"


def images_of(data: RunData | RunFeatures) -> dict[str, Any]:
    """Describe what a run trains on, in what a checkpoint can hold.

    Returns:
        "count" N, "checksum" of all of them, "names" (N,) int64 that stand for their paths (or numbers), and "rows",
        (N,) int64 checksums of pixels or given features, or (N, 8) float16 of features that a network has made.
    """
    sets = [each for each in (data.train, getattr(data, "unlabelled", None)) if each is not None]
    rows = torch.cat([_rows(each) for each in sets])
    names = torch.cat([_names(each) + (number << 40) for number, each in enumerate(sets)])
    checksum = data.train.checksum or zlib.crc32(rows.numpy().tobytes())
    return {"count": len(rows), "checksum": checksum, "names": names, "rows": rows}


def _is(before: Mapping[str, Any], data: RunData | RunFeatures) -> bool:
    """Whether a folder or file holds what it held, by the checksum that was made when it was read."""
    own = data.train
    count = len(own) if isinstance(own, FeatureSet) else len(own.images)
    return own.checksum != 0 and (count, own.checksum) == (before["count"], before["checksum"])


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Difference:
    """Compare two descriptions by `images_of`."""
    old, new = before["names"].numpy(), now["names"].numpy()
    _, there, here = np.intersect1d(old, new, assume_unique=True, return_indices=True)
    one, other = before["rows"][there], now["rows"][here]
    changed = ((one.float() - other.float()).abs() > _NEAR).any(1) if one.is_floating_point() else one != other
    return Difference(len(new) - len(here), len(old) - len(there), int(changed.sum()))


def check_images(
    folder: Path, state: Mapping[str, Any] | None, data: RunData | RunFeatures, new_images: bool
) -> tuple[dict[str, Any] | None, bool]:
    """Refuse to go on with other images than those that a run was trained on, unless that is asked for.

    Args:
        folder: Of the run.
        state: Of its newest checkpoint, or None.
        data: What there is now.
        new_images: Whether others are welcome.

    Returns:
        On rank 0 what the next checkpoints say of the images, None on the others; and whether they are others.

    Raises:
        UsageError: they are others and not welcome, or come too late.

    Collective: all ranks must call; rank 0 looks.
    """
    record, problem, others = None, None, False
    if distributed.rank() == 0:
        before = None if state is None else state.get("images")
        if before is not None and _is(before, data):
            record = before
        else:
            record = images_of(data)
            difference = None if before is None else compare(before, record)
            others = bool(difference)
            if state is not None and difference:
                problem = _problem(folder, state, difference, data.train, new_images)
    problem, others = distributed.broadcast((problem, others))
    if problem is not None:
        raise UsageError(problem)
    return record, others


def _problem(
    folder: Path, state: Mapping[str, Any], difference: Difference, now: ImageSet | FeatureSet, new_images: bool
) -> str | None:
    what = "rows" if isinstance(now, FeatureSet) and now.image_shape is None else "images"
    line = (
        f"{folder} was trained on other {what} than {now.name} holds now: {difference}, of {state['images']['count']}"
    )
    if not new_images:
        return f"{line}; --run.new_images true goes on with them, another --run.name begins anew"
    if state["stage"] == "refine" or (state["stage"] == "neighbours" and state["stage_done"]):
        return f"{line}, and its heads on neighbours were trained on those: choose another --run.name"
    return None


def _names(of: ImageSet | FeatureSet) -> Tensor:
    if not of.paths:
        return torch.arange(len(of) if isinstance(of, FeatureSet) else len(of.images))
    digests = (hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in of.paths)
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)


def _rows(of: ImageSet | FeatureSet) -> Tensor:
    if isinstance(of, FeatureSet):
        return _checksums(of.features.numpy()) if of.image_shape is None else sketch(of.features)
    return _checksums(of.images.numpy())


def _checksums(array: np.ndarray) -> Tensor:
    """CRC-32 of each row, (N,) int64."""

    def checksums(rows: Iterable[np.ndarray]) -> list[int]:
        return [zlib.crc32(np.ascontiguousarray(row).data) for row in rows]

    parts: Sequence[np.ndarray] = [block for _, block in blocks(array)]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
        found = [checksum for part in threads.map(checksums, parts) for checksum in part]
    return torch.tensor(found, dtype=torch.int64)


def sketch(features: Tensor) -> Tensor:
    """Describe the direction of each row so that another device's arithmetic makes no difference that counts.

    Args:
        features: (N, F).

    Returns:
        (N, 8) float16: products with directions of which each number is -1 or 1; they differ by about as much as
        the unit vectors do.
    """
    signs = torch.where(uniforms(0, 0, torch.arange(features.shape[1]), 0, _SKETCH) < 0.5, -1.0, 1.0)
    found = []
    for _, block in blocks(features.numpy()):
        rows = torch.from_numpy(block).float()
        found.append((torch.nn.functional.normalize(rows, dim=1) @ signs.to(rows.dtype)).half())
    return torch.cat(found)
