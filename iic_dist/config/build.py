"""From a config to the pieces of a run: its images, its views, its network, its folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from iic_dist import distributed
from iic_dist.config import Config
from iic_dist.data.folder import Reading
from iic_dist.data.image_set import ImageSet
from iic_dist.data.load import load_image_set
from iic_dist.device import exact_device
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.losses.objective import Objective
from iic_dist.models import Backbone, ClusterNet, ProjectionHead, SubHeads, build_backbone
from iic_dist.views.policies import policy
from iic_dist.views.views import Views


@dataclass
class RunData:
    """The images of a run.

    Attributes:
        train: What all heads train on.
        evaluation: What the clusters are judged on; may be the same object.
        unlabelled: More images for the overclustering and contrastive heads, or None.
        unreadable: Files of an image folder that were passed over, with the reason.
    """

    train: ImageSet
    evaluation: ImageSet
    unlabelled: ImageSet | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def load_data(config: Config, place: Place) -> RunData:
    """Load what `config.data` names; local rank 0 goes first, because it may have to download or decode.

    Raises:
        UsageError: an image set cannot be loaded, or a folder's images are not the same on all ranks.

    Collective: all ranks must call.
    """
    data = config.data
    first = place.local_rank == 0
    unreadable: list[tuple[str, str]] = []
    reading = Reading(
        cache=Path(data.cache or f"{data.root}/decoded"),
        workers=data.workers,
        relist=data.relist and first,  # the others of a machine take what the first has found
        verify=first,
        progress=config.monitor.progress and place.is_main,
        resampling=data.resampling or "bilinear",
        follow_links=data.follow_links,
        max_pixels=data.max_pixels,
        truncated=data.truncated,
    )

    def load(split: str) -> ImageSet:
        loaded = load_image_set(
            data.name,
            Path(data.root),
            split,
            image_size=data.image_size if data.name.startswith("folder:") else None,
            folder_labels=data.folder_labels,
            reading=reading,
            download=data.download and first,
            unreadable=unreadable,
        )
        return loaded if data.channels is None else loaded.with_channels(data.channels)

    with distributed.local_main_first(place):
        train = load(data.train_on)
        evaluation = train if data.evaluate_on == data.train_on else load(data.evaluate_on)
        unlabelled = load("unlabelled") if data.unlabelled else None
    checksums = distributed.gather_objects(train.checksum)
    if len(set(checksums)) > 1:
        other = next(rank for rank, checksum in enumerate(checksums) if checksum != checksums[0])
        raise UsageError(
            f"{train.name} holds other images for rank {other} than for rank 0: give all machines the same"
        )
    return RunData(train, evaluation, unlabelled, unreadable)


def build_objectives(config: Config, device: torch.device) -> dict[str, Objective]:
    """Say of each head with clusters what a complete config trains it towards.

    `loss.prior` is for the clustering heads. The overclustering head keeps clusters of equal size, so that a large
    class gets many of them.
    """
    prior, weight = config.loss.prior, config.loss.entropy_weight
    if isinstance(prior, list):
        clustering = Objective(weight, torch.tensor(prior, dtype=torch.float64, device=exact_device(device)))
    else:
        clustering = Objective(1.0 if prior == "free" else weight)
    return dict.fromkeys(config.clustering_heads, clustering) | {"overclustering": Objective(weight)}


def build_views(config: Config, device: torch.device | None = None) -> Views:
    """Make the view policy of a config that knows the size and the channels of its images.

    Args:
        config: What is asked for.
        device: Where the views go; None leaves them where the images are.
    """
    channels, size = config.image_shape
    given = dataclasses.asdict(config.views)
    views = policy(given.pop("policy"), image_size=size, channels=channels, seed=config.run.seed, **given)
    views.destination = device
    return views


def _check_evaluation(backbone: Backbone, config: Config, example: torch.Tensor) -> None:
    """Raise a UsageError where the backbone has other features for views of the size that an evaluation sees."""
    size, name = config.views.evaluate_size, config.model.backbone
    if size in (None, example.shape[-1]):
        return
    features = Backbone(backbone.net, example.new_zeros(1, example.shape[1], size, size), name).num_features
    if features != backbone.num_features:
        raise UsageError(
            f"views.evaluate_size={size}: {name} has {features} features there and {backbone.num_features} at "
            f"{example.shape[-1]}: leave it out"
        )


def build_model(config: Config, in_channels: int, image_size: int, fetch_weights: bool = True) -> ClusterNet:
    """Build the network of a complete config; its initial weights are a function of `run.seed`.

    Args:
        config: What is asked for.
        in_channels: Of the views.
        image_size: Side of the views in pixels.
        fetch_weights: False leaves `model.pretrained` weights out, for a checkpoint that holds others.
    """
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        backbone = build_backbone(
            model.backbone,
            in_channels=in_channels,
            image_size=image_size,
            norm=model.norm,
            pretrained=model.pretrained,
            fetch_weights=fetch_weights,
            weights=model.weights,
            weights_digest=model.weights_digest,
        )
        features = backbone.num_features
        _check_evaluation(backbone, config, torch.zeros(1, in_channels, image_size, image_size))
        heads: dict[str, torch.nn.Module] = {
            head: SubHeads(features, model.sub_heads, k, model.head_init_std)
            for head, k in config.clustering_heads.items()
        }
        if model.num_overclusters:
            heads["overclustering"] = SubHeads(features, model.sub_heads, model.num_overclusters, model.head_init_std)
        if model.projection_dim:
            heads["contrastive"] = ProjectionHead(
                features, model.projection_dim, model.projection_hidden, norm=model.norm
            )
    return ClusterNet(backbone, heads, freeze_backbone=model.freeze_backbone)
