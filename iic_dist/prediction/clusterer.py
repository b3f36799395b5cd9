"""A trained run in use: `iic_dist.load("runs/NAME").predict(images)`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from iic_dist.config import Config
from iic_dist.config.build import build_model, build_views
from iic_dist.data.decode import decode_image, square
from iic_dist.data.features import PREFIX
from iic_dist.data.image_set import ImageSet, to_channels
from iic_dist.device import choose_device, exact_device
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.evaluation import metrics
from iic_dist.models import ClusterNet
from iic_dist.models.feature_heads import heads_of_state, load_network
from iic_dist.models.given_features import GivenFeatures
from iic_dist.training import checkpoint
from iic_dist.training.run_folder import CONFIG, settings_of

_ROWS = 8192  # features that are clustered together

Picture = str | os.PathLike[str] | Image.Image
Images = Tensor | np.ndarray | ImageSet | Picture | Sequence[Picture]


@dataclass(frozen=True)
class Prediction:
    """What a run says of M images; all on the CPU.

    Attributes:
        clusters: (M,) int64, the cluster of each in [0, K), by the selected sub-head.
        confidence: (M,) float32 in (0, 1], its probability.
        sub_heads: (M, H) int64, the cluster by each sub-head, in that sub-head's own numbers.
        probabilities: (M, K) float32, of all clusters, by the selected sub-head.
        embeddings: (M, F) float32, the features of the backbone.
        selected: The selected sub-head: the one of lowest loss in training.
    """

    clusters: Tensor
    confidence: Tensor
    sub_heads: Tensor
    probabilities: Tensor
    embeddings: Tensor
    selected: int

    def __len__(self) -> int:
        return len(self.clusters)

    def agreement(self) -> Tensor:
        """Return which share of the other sub-heads agrees, (M,) float32: `evaluation.metrics.agreeing_share`."""
        return metrics.agreeing_share(self.sub_heads, self.selected, self.probabilities.shape[1])

    def columns(self) -> dict[str, Tensor]:
        """Return what has a row for each image, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "selected"}

    @staticmethod
    def join(parts: Sequence[Prediction]) -> Prediction:
        """Put predictions of one run behind each other."""
        joined = {name: torch.cat([part.columns()[name] for part in parts]) for name in parts[0].columns()}
        return Prediction(**joined, selected=parts[0].selected)


class Clusterer:
    """The network of a run, ready to cluster images; `load` makes one.

    Args:
        config: The complete config of the run.
        state: A checkpoint of it.
        device: Where to compute.

    Attributes:
        config: The complete config of the run.
        device: Where it computes.
        image_size: Side in pixels of the images that the network was trained on, before views were made of them.
        channels: Their channels: 1 or 3.
        head: The clustering head that speaks: of a run with several K the recommended one.
        num_clusters: Its K.
        selected: The sub-head that speaks: the one of lowest loss, chosen without labels.
        batch_size: Images of one forward pass.
        takes_features: Whether the run is on features of a file, and so has no images.
    """

    def __init__(self, config: Config, state: dict[str, Any], device: torch.device) -> None:
        self.config, self.device = config, device
        self.head: str = state["clustering_head"]
        self.num_clusters = config.clustering_heads[self.head]
        self.selected = int(state["sub_heads"]["losses"][self.head].argmin())
        self.batch_size = config.train.evaluate_batch_size
        self.dtype = config.dtype
        self.takes_features = config.data.name.startswith(PREFIX)
        if self.takes_features:
            heads = heads_of_state(state["model"], config.clustering_heads)
            self.model = ClusterNet(GivenFeatures(len(heads[self.head].space.mean)), heads, freeze_backbone=True)
            self.model.load_state_dict(state["model"])
        else:
            self.channels, self.image_size = config.image_shape
            self.resampling = config.data.resampling or "bilinear"
            self.views = build_views(config, device)
            in_channels = self.views.channels(self.channels)
            self.model = build_model(config, in_channels, self.views.size, fetch_weights=False)
            load_network(self.model, state["model"], config.clustering_heads)
        self.model.to(device, self.dtype).eval()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image (C, S, S), or of a row (F,) of a run on features."""
        if self.takes_features:
            return (self.model.num_features,)
        return (self.channels, self.image_size, self.image_size)

    def predict(self, images: Images) -> Prediction:
        """Cluster images.

        Everything gets the size and the channels of the images that the run was trained on: of another size, the
        central square is resized; a gray run sees the luma of colour images, a colour run gray images in RGB.

        Args:
            images: A path or a PIL image, or a list of them; or (M, C, H, W) uint8, C is 1 or 3, as a tensor or
                an array, or an ImageSet. What fits in memory: `python -m iic_dist.predict` is for whole folders.

        Raises:
            UsageError: an array that is not (M, 1 or 3, H, W) uint8, or something else than images.
            Exception: a file that cannot be read as an image.
        """
        if self.takes_features:
            raise UsageError("this run is on features: give them to predict_features")
        none = torch.empty(0, *self.input_shape, dtype=torch.uint8)
        return Prediction.join([self.predict_batch(batch) for batch in (none, *self._batches(images))])

    @torch.no_grad()
    def predict_batch(self, batch: Tensor) -> Prediction:
        """Cluster images that have the size and the channels of the run, in one forward pass.

        Args:
            batch: (B, C, S, S) uint8.
        """
        images = batch.to(exact_device(self.device))
        views = self.views.evaluation(images, torch.arange(len(images), device=images.device), dtype=self.dtype)
        return self._of_features(self.model.backbone(views))

    @torch.no_grad()
    def predict_features(self, features: Tensor | np.ndarray) -> Prediction:
        """Cluster features as those that a run on features was trained on.

        Args:
            features: (M, F), floating point, in memory or mapped.

        Raises:
            UsageError: they are of another shape.
        """
        if isinstance(features, np.ndarray):
            features = torch.from_numpy(features)
        width = self.model.num_features
        if features.ndim != 2 or features.shape[1] != width or not features.is_floating_point():
            raise UsageError(
                f"features of shape {tuple(features.shape)}, {features.dtype}: must be (M, {width}) floats"
            )
        starts = range(0, max(1, len(features)), _ROWS)
        parts = [features[start : start + _ROWS].to(self.device, self.dtype) for start in starts]
        return Prediction.join([self._of_features(part) for part in parts])

    def _of_features(self, features: Tensor) -> Prediction:
        logits = self.model.heads[self.head](features)
        probabilities = torch.softmax(logits[:, self.selected].float(), -1)
        best = probabilities.max(-1)
        return Prediction(
            best.indices.cpu(),
            best.values.cpu(),
            logits.argmax(-1).cpu(),
            probabilities.cpu(),
            features.float().cpu(),
            self.selected,
        )

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """Decode one file as the images of a folder are in training: (C, S, S) uint8.

        Raises:
            Exception: the file is malformed; Pillow raises many kinds.
        """
        data = self.config.data
        image = decode_image(Path(path), self.image_size, data.max_pixels, self.resampling, data.truncated)
        return to_channels(image, self.channels)

    def _batches(self, images: Images) -> Iterator[Tensor]:
        if isinstance(images, ImageSet):
            images = images.images
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images if images.flags.writeable else images.copy())
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
                raise UsageError(
                    f"images of shape {tuple(images.shape)}, {images.dtype}: must be (M, 1 or 3, H, W), torch.uint8"
                )
            for batch in images.split(self.batch_size):
                yield to_channels(self._sized(batch.cpu()), self.channels)
            return
        pictures = [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)
        for start in range(0, len(pictures), self.batch_size):
            yield torch.stack([self._picture(picture) for picture in pictures[start : start + self.batch_size]])

    def _sized(self, batch: Tensor) -> Tensor:
        if batch.shape[-2:] == (self.image_size, self.image_size):
            return batch
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in to_channels(batch, 3)]
        return torch.stack([square(picture, self.image_size, self.resampling) for picture in pictures])

    def _picture(self, picture: Picture) -> Tensor:
        if isinstance(picture, str | os.PathLike):
            return self.read(picture)
        if not isinstance(picture, Image.Image):
            raise UsageError(f"an image as {type(picture).__name__}: must be a path or a PIL image")
        turned = ImageOps.exif_transpose(picture)
        return to_channels(square(turned, self.image_size, self.resampling), self.channels)


def load(run: str | os.PathLike[str], device: str = "auto") -> Clusterer:
    """Load a trained run from its folder alone; the images that it was trained on are not needed.

    Args:
        run: Its folder, runs/NAME.
        device: "cpu", "cuda", "mps", or "auto" for CUDA, else MPS, else the CPU; under torchrun that of the rank.

    Raises:
        UsageError: there is no such run, it has no checkpoint that verifies, or its config.yaml says too little.
    """
    folder = Path(run)
    config = settings_of(folder)
    known = config.data.name.startswith(PREFIX) or (config.data.image_size and config.data.channels)
    if not (known and config.model.num_clusters):
        raise UsageError(
            f"{folder / CONFIG} lacks data.image_size, data.channels or model.num_clusters: train the run again"
        )
    state = checkpoint.load_newest(folder / "checkpoints")
    if state is None:
        raise UsageError(f"{folder}: {checkpoint.why_none(folder / 'checkpoints')}")
    place = choose_device(device, Place.from_environment())
    try:
        return Clusterer(config, state, place)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{folder}: its checkpoint is not of the network of its config.yaml: {reason}") from error
