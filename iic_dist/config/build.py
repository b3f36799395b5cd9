"""From a config to the pieces of a run: its images, its views, its network, its folder."""

from __future__ import annotations

import copy
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from iic_dist import distributed
from iic_dist.views.views import Views, policy
from iic_dist.config import Config
from iic_dist.data.image_set import ImageSet
from iic_dist.data.load import load_image_set
from iic_dist.data.sampler import Sampler
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.models import ClusterNet, ProjectionHead, SubHeads, build_backbone
from iic_dist.losses.objective import Objective, read_sizes
from iic_dist.training.schedule import Schedule


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

    def load(split: str) -> ImageSet:
        loaded = load_image_set(
            data.name,
            Path(data.root),
            split,
            image_size=data.image_size if data.name.startswith("folder:") else None,
            folder_labels=data.folder_labels,
            cache=Path(data.cache or f"{data.root}/decoded"),
            workers=data.workers,
            relist=data.relist and first,  # the others of a machine take what the first has found
            verify=first,
            download=data.download and first,
            progress=config.monitor.progress and place.is_main,
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


def complete(config: Config, train: ImageSet) -> Config:
    """Return a copy of `config` in which nothing is left to be chosen from the images.

    What it says of the images is enough to build the network and its input again without them.

    Raises:
        UsageError: the number of clusters is not given and the images have no classes to count, or the images have
            another size or other channels than the config says.
    """
    config = copy.deepcopy(config)
    if config.model.num_clusters is None:
        if train.num_classes < 2:
            raise UsageError(
                f"{train.name} has no classes to count: say how many clusters you want with --model.num_clusters"
            )
        config.model.num_clusters = train.num_classes
    if isinstance(config.loss.prior, str) and config.loss.prior not in ("uniform", "free"):
        config.loss.prior = read_sizes(config.loss.prior)
    _check_prior(config)
    channels, image_size = train.images.shape[1], train.images.shape[-1]
    for name, asked, there in (
        ("image_size", config.data.image_size, image_size),
        ("channels", config.data.channels, channels),
    ):
        if asked not in (None, there):
            raise UsageError(f"data.{name}={asked}: the images of {train.name!r} have their own, {there}: leave it out")
    config.data.image_size, config.data.channels = image_size, 1 if channels == 1 else 3
    views = build_views(config)
    config.views.size = views.size
    if config.views.mean is None and config.views.std is None and views.channels(channels) == channels:
        # A sample of 10,000 images fixes both to three digits; the mean over all would hold a float copy of them.
        pixels = train.images[:: max(1, len(train.images) // 10_000)].float() / 255
        config.views.mean = [round(value, 4) for value in pixels.mean((0, 2, 3)).tolist()]
        config.views.std = [round(max(value, 1e-3), 4) for value in pixels.std((0, 2, 3)).tolist()]
    return config


def _check_prior(config: Config) -> None:
    prior, k = config.loss.prior, config.model.num_clusters
    if isinstance(prior, list) and len(prior) != k:
        raise UsageError(f"loss.prior has {len(prior)} sizes for model.num_clusters={k}: give one for each cluster")
    if isinstance(prior, list) and math.isinf(sum(prior)):
        raise UsageError(f"loss.prior with {max(prior)!r}: the sum of the sizes is too large for a number")


def build_objectives(config: Config, device: torch.device) -> dict[str, Objective]:
    """Say of each head with clusters what a complete config trains it towards.

    `loss.prior` is for the clustering heads. The overclustering head keeps clusters of equal size, so that a large
    class gets many of them.
    """
    prior, weight = config.loss.prior, config.loss.entropy_weight
    if isinstance(prior, list):
        clustering = Objective(weight, torch.tensor(prior, dtype=torch.float64, device=device))
    else:
        clustering = Objective(1.0 if prior == "free" else weight)
    return dict.fromkeys(config.clustering_heads, clustering) | {"overclustering": Objective(weight)}


def build_views(config: Config) -> Views:
    """Make the view policy of a config that knows the size and the channels of its images."""
    data, views = config.data, config.views
    assert data.image_size is not None, "complete() comes first"
    assert data.channels is not None, "complete() comes first"
    return policy(
        views.policy,
        image_size=data.image_size,
        channels=data.channels,
        seed=config.run.seed,
        repeats=views.repeats,
        size=views.size,
        mean=views.mean,
        std=views.std,
        crop_area=views.crop_area,
        crop_sides=views.crop_sides,
        rotation=views.rotation,
        flip=views.flip,
        jitter=views.jitter,
        gray=views.gray,
        blur=views.blur,
        sobel=views.sobel,
        impl=views.impl,
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
        )
        features = backbone.num_features
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


def build_schedule(config: Config, place: Place, num_labelled: int, num_images: int) -> Schedule:
    """Lay out the passes of every epoch.

    Args:
        config: What is asked for.
        place: This rank, which gets its share of each batch.
        num_labelled: Images that all heads train on, the first ones.
        num_images: These and the unlabelled ones.

    Raises:
        UsageError: the batch size does not fit the images or the ranks.
    """
    samplers = [
        Sampler(size, config.data.batch_size, config.run.seed, place.rank, place.world_size)
        for size in dict.fromkeys((num_labelled, num_images))
    ]
    return Schedule(
        config.heads,
        samplers[0],
        samplers[-1],
        alternate=config.train.schedule == "alternate",
        order=config.train.order,
        contrastive_warmup_epochs=config.train.contrastive_warmup_epochs,
        views=1 + config.views.repeats,
    )


def run_folder(config: Config) -> Path:
    """Choose the folder of the run: its name, or the data set's name and the next free number.

    A restart by torchrun goes on in the newest folder of that name instead of opening another.

    Raises:
        UsageError: the name is not a plain file name.

    Collective: all ranks must call; rank 0's answer counts.
    """
    root = Path(config.run.root)
    name = config.run.name
    if name is not None and (not re.fullmatch(r"[A-Za-z0-9._-]+", name) or set(name) == {"."}):
        raise UsageError(f"run.name={name!r}: use letters, digits, '.', '_' and '-' alone")
    if name is None and distributed.rank() == 0:
        folder = config.data.name.removeprefix("folder:").rstrip("/").rsplit("/", 1)[-1]
        stem = re.sub(r"[^A-Za-z0-9]+", "-", folder).strip("-") or "run"
        name = _numbered(root, stem, reuse=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)
    return root / str(distributed.broadcast(name))


def _numbered(root: Path, stem: str, reuse: bool) -> str:
    """Open the folder STEM-N of the next free number N, or name the newest one where that is to be gone on with."""
    taken = [path.name.removeprefix(f"{stem}-") for path in root.glob(f"{stem}-*")]
    newest = max((int(number) for number in taken if number.isdecimal()), default=0)
    if reuse and newest:
        return f"{stem}-{newest}"
    while True:  # another run may take the number first
        newest += 1
        try:
            (root / f"{stem}-{newest}").mkdir(parents=True)
        except FileExistsError:
            continue
        return f"{stem}-{newest}"
