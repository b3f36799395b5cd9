"""Images through a network that stays as it is, each rank its share: features, one row an image.

Images are cut into the same batches whatever the number of ranks, because a network may round the last bit differently
in a batch of another size.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from iic_dist import distributed
from iic_dist.data.decode import Decoded, Resampling, chunk_size, decoded_files
from iic_dist.data.features import Embedded
from iic_dist.data.formats import MAX_PIXELS
from iic_dist.data.listing import Unreadable
from iic_dist.data.source import ImageSource
from iic_dist.device import exact_device
from iic_dist.models import Backbone
from iic_dist.views.views import Views

_BATCH = {"cpu": 32, "cuda": 128, "mps": 128}
"""Images of one forward pass. On a CPU small ones stay in its caches: EfficientNet-lite0 at 160 px takes 14 ms of one
core an image in batches of 32, and 20 ms in batches of 128."""

Precision = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class Embedder:
    """A backbone as a function of images; it and its input must be on `device` and of one dtype.

    Attributes:
        backbone: (B, C, S, S) -> (B, F).
        views: `views.evaluation` makes its input.
        device: Where it computes.
        precision: bfloat16 is autocast with float32 weights.
        channels_last: Memory format of the input.
    """

    backbone: Backbone
    views: Views
    device: torch.device
    precision: Precision = "float32"
    channels_last: bool = False

    @property
    def batch_size(self) -> int:
        """Images of one forward pass, if nobody asks for others."""
        return _BATCH[self.device.type]

    @property
    def dtype(self) -> torch.dtype:
        """Of the input and of the features."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep the backbone in evaluation mode; its mode is restored."""
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            yield
        finally:
            self.backbone.train(was_training)

    @torch.inference_mode()
    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return the features (B, F) of `images[rows]` on the device.

        Args:
            images: (M, C, H, W) uint8 on the device.
            rows: (B,) int64 there.
        """
        seen = self.views.evaluation(images, rows, dtype=self.dtype, channels_last=self.channels_last)
        with self._autocast():
            features: Tensor = self.backbone(seen)
        return features.to(self.dtype)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def extract_images(
    embed: Embedder,
    images: ImageSource,
    *,
    count: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    after_each: Callable[[], None] | None = None,
) -> Tensor:
    """Return the features of images in memory, (N, F) on the CPU, the same on every rank.

    Args:
        embed: The network.
        images: All images, for every rank.
        count: N, the first of them; None for all.
        batch_size: Images of one forward pass; None for `embed.batch_size`.
        progress: Show a progress bar.
        after_each: Called after every forward pass, equally often on all ranks; may raise to end it here.

    Collective: all ranks must call; gathers all features.
    """
    count, batch_size = len(images) if count is None else count, batch_size or embed.batch_size
    own, most = _share(range(0, count, batch_size))
    batches = [torch.arange(start, min(start + batch_size, count)) for start in own]
    parts = [torch.empty(0, embed.backbone.num_features, dtype=embed.dtype)]
    with embed.at_work(), _Bar(count, sum(map(len, batches)), progress) as bar:
        for number in range(most):
            if number < len(batches):
                pixels, rows, _ = images.gather(batches[number])
                if number + 1 < len(batches):
                    images.prefetch(batches[number + 1])
                parts.append(embed(pixels, rows).cpu())
                bar.done(len(batches[number]))
            if after_each is not None:
                after_each()
    features = torch.cat(parts)  # not under inference_mode: a head can be trained on them
    return distributed.gather_rows(features, distributed.gather_sizes(len(features)))


def embed_files(
    embed: Embedder,
    root: Path,
    paths: list[str],
    *,
    image_size: int,
    resampling: Resampling = "bilinear",
    max_pixels: int = MAX_PIXELS,
    truncated: bool = False,
    workers: int | None = 0,
    batch_size: int | None = None,
    progress: bool = False,
    after_each: Callable[[], None] | None = None,
) -> Generator[Embedded]:
    """Decode this rank's part of some files and embed them, in one stream: few images are in memory at a time.

    Args:
        embed: The network.
        root: What the paths are relative to.
        paths: Of all files, for every rank.
        image_size: Side that the images are decoded at, pixels.
        resampling, max_pixels, truncated: See `decode_image`.
        workers: Processes that decode beside the network. 0: this one does.
        batch_size: Images of one forward pass, in whole chunks of `decoded_files`; None for `embed.batch_size`.
        progress: Show a progress bar.
        after_each: As for `extract_images`.

    Yields:
        The features of the files that could be decoded, in order, on the CPU.
    """
    chunk = chunk_size(image_size)
    window = chunk * max(1, (batch_size or embed.batch_size) // chunk)
    own, most = _share(range(0, len(paths), window))
    part = paths[own[0] : own[-1] + window] if own else []
    with (
        embed.at_work(),
        warnings.catch_warnings(),
        _Bar(len(paths), len(part), progress) as bar,
        decoded_files(
            root, part, image_size, max_pixels, workers=workers, resampling=resampling, truncated=truncated
        ) as chunks,
    ):
        warnings.simplefilter("ignore")  # where this process decodes: Pillow warns of oddities that it reads
        ahead: Embedded | None = None  # its features are still being computed, on a GPU
        for decoded in _grouped(iter(chunks), window // chunk):
            now = _embedded(embed, decoded)
            if ahead is not None:
                yield _on_cpu(ahead)
            ahead = now
            bar.done(len(now.paths) + len(now.malformed))
            if after_each is not None:
                after_each()
        if ahead is not None:
            yield _on_cpu(ahead)
        if after_each is not None and len(own) < most:  # this rank has a batch less than others
            after_each()


def _share(starts: range) -> tuple[Sequence[int], int]:
    """Return where this rank's batches start, one part of all without a gap, and how many a rank has at most."""
    world_size, rank = distributed.world_size(), distributed.rank()
    own = starts[len(starts) * rank // world_size : len(starts) * (rank + 1) // world_size]
    return own, -(-len(starts) // world_size)


def _grouped(chunks: Iterator[Decoded], size: int) -> Iterator[list[Decoded]]:
    while group := list(itertools.islice(chunks, size)):
        yield group


def _embedded(embed: Embedder, group: list[Decoded]) -> Embedded:
    images = torch.from_numpy(np.concatenate([each.images for each in group])).to(exact_device(embed.device))
    paths: list[str] = []
    malformed: Unreadable = []
    for each in group:
        paths += each.paths
        malformed += each.malformed
    if not paths:
        return Embedded(torch.empty(0, embed.backbone.num_features, dtype=embed.dtype), [], malformed)
    return Embedded(embed(images, torch.arange(len(images), device=images.device)), paths, malformed)


def _on_cpu(ahead: Embedded) -> Embedded:
    return Embedded(ahead.features.cpu(), ahead.paths, ahead.malformed)


class _Bar:
    """A progress bar over the images of all ranks, of which this one has done its part as far as the others.

    Args:
        total: Images of all ranks.
        own: Of this one.
        shown: Whether there is a bar.
    """

    def __init__(self, total: int, own: int, shown: bool) -> None:
        self._own, self._total, self._done = max(1, own), total, 0
        self._bar = tqdm(desc="features", unit="image", total=total, disable=not shown, dynamic_ncols=True)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def done(self, images: int) -> None:
        """Count images of this rank."""
        self._done += images
        self._bar.update(self._done * self._total // self._own - self._bar.n)
