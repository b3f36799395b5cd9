"""Settings for a folder of images, chosen from the images; options and config files win over them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iic_dist.config import Config
from iic_dist.config.weights import LARGEST_SIDE
from iic_dist.data.folder import listing_under
from iic_dist.data.survey import Survey, survey
from iic_dist.models.pretrained import preprocessing, what_is_missing
from iic_dist.models.timm_backbones import PREFIX
from iic_dist.wording import counted

DEFAULT = "timm/vit_small_patch14_dinov2.lvd142m"
"""The backbone whose features photographs get; its weights were made without labels."""

NEIGHBOURS, STEPS = "neighbours.steps", 1000

CHOICES = frozenset(
    (
        *("data.image_size", "data.batch_size", "views.policy", "model.backbone", "model.pretrained"),
        *("model.freeze_backbone", "model.num_overclusters", "model.projection_dim", "loss.entropy_weight"),
        *("optim.name", "optim.lr", "optim.schedule", "train.epochs", "train.evaluate_batch_size", NEIGHBOURS),
        *("train.contrastive_warmup_epochs", "loss.temperature", "views.repeats", "views.size", "views.evaluate_size"),
        "neighbours.whitening",
    )
)
"""All settings that may be chosen for some folder or features."""

_ALL_EPOCHS = 10_000
CPU_REASON = "what a CPU does in less than half an hour"
_PHOTOGRAPH_SIDE = 64
_LARGEST_SIDE, _LARGEST_ON_CPU = 96, 48
_SMALL_SIDE, _TINY_SIDE = 32, 16
_FEWEST, _MOST_EPOCHS = {"small_cnn": 30, "medium_cnn": 5, "resnet18": 50}, 400
_ADAM_LR, _MUON_LR = {"small_cnn": 2e-3, "medium_cnn": 1e-3, "resnet18": 1e-3}, 0.14
_REPEATS = 3
_CPU_IMAGES = 200_000
"""Images of 32 px that a CPU looks at in less than 30 minutes, in four views each: medium_cnn does 130 a second."""


@dataclass(frozen=True)
class Choice:
    """A value for a setting, and why."""

    value: Any
    reason: str


def settings(
    found: Survey,
    image_size: int | None,
    channels: int | None,
    num_clusters: int | list[int] | None,
    world_size: int = 1,
    on_cpu: bool = False,
    optimizer: str | None = None,
) -> dict[str, Choice]:
    """Choose settings, "group.field" by name.

    Args:
        found: What the images are like.
        image_size, channels, num_clusters, optimizer: What the user asked for, None where nothing.
        world_size: Ranks that share a batch.
        on_cpu: Whether a CPU is to do it.
    """
    largest_side = _LARGEST_ON_CPU if on_cpu else _LARGEST_SIDE
    size = image_size or max(8, min(largest_side, found.side))
    colour = found.colour if channels is None else channels == 3
    small = size <= _SMALL_SIDE and not colour
    light = "small_cnn" if size < _TINY_SIDE else "medium_cnn"
    backbone = light if small or on_cpu else "resnet18"
    optimizer = optimizer or ("muon" if backbone == "medium_cnn" else "adam")
    several = backbone == "medium_cnn"
    count, most = found.num_readable, 128 if several else 256
    largest = max(num_clusters) if isinstance(num_clusters, list) else num_clusters or 10
    kind = "in colour" if colour else "gray"
    policy = (
        Choice("simclr", "in colour: crops, mirror images, changes of colour")
        if colour
        else Choice("digits", "gray: slight turns, shifts and changes of contrast, no mirror images")
    )
    heads = _contrast_first() if colour else _gray_heads(largest)
    return {
        "data.image_size": Choice(size, f"the median shorter side, from 8 to {largest_side}"),
        "data.batch_size": Choice(
            batch_size(count, world_size, most),
            f"{most} or less, so that an epoch has eight steps, but 16 or more; each rank gets a power of two",
        ),
        "views.policy": policy,
        "model.backbone": Choice(
            backbone,
            "a CPU is to train it"
            if on_cpu and not small
            else f"{kind} and {'up to' if size <= _SMALL_SIDE else 'above'} {_SMALL_SIDE} px",
        ),
        "model.projection_dim": Choice(128, "a contrastive head beside the clustering heads"),
        "loss.entropy_weight": Choice(2.0, "pushes towards clusters of equal size"),
        "optim.name": Choice(optimizer, "learns more in the same time than Adam" if optimizer == "muon" else "usual"),
        "optim.lr": Choice(_MUON_LR if optimizer == "muon" else _ADAM_LR[backbone], f"with {optimizer} and {backbone}"),
        "optim.schedule": Choice("cosine", "down to zero"),
        "train.epochs": _epochs(count, _images_seen(small, size), _FEWEST[backbone], size, on_cpu),
        "train.evaluate_batch_size": Choice(256, "little memory"),
        **heads,
        "neighbours.whitening": Choice(0.75, "so that not a few features decide what is near"),
        **(_smaller_views(size) if on_cpu and size >= _TINY_SIDE else {}),
        **({"views.repeats": Choice(_REPEATS, "four views of an image teach more than two of two")} if several else {}),
    }


def _images_seen(small: bool, size: int) -> int:
    """Choose how many images are seen in all epochs together."""
    if not small:
        return 1_000_000
    return 75_000 if size >= _TINY_SIDE else 120_000


def _epochs(num_images: int, seen: int, fewest: int, size: int, on_cpu: bool) -> Choice:
    """Choose how long to train: until so many images are seen, in at least so many epochs, if a CPU can do that."""
    epochs = min(_MOST_EPOCHS, max(fewest, round(seen / num_images)))
    affordable = max(1, round(_CPU_IMAGES * (_SMALL_SIDE / size) ** 2 / num_images))
    if on_cpu and affordable < epochs:
        return Choice(affordable, CPU_REASON)
    return Choice(epochs, f"about {seen:,} images seen, from {fewest} to {_MOST_EPOCHS} epochs")


def batch_size(num_images: int, world_size: int, most: int = 256) -> int:
    """Choose the images of a step for so many images and ranks: the ranks times a power of two.

    Not above `most` nor the images, except that each rank gets one, and one alone two; from 16 on so that an epoch has
    eight steps.
    """
    batch = max(2, world_size)
    while 2 * batch <= min(most, max(16, num_images // 8), num_images):
        batch *= 2
    return batch


def with_batch_that_fits(config: Config, num_images: int, world_size: int, say: Callable[[str], None]) -> Config:
    """Return a config whose batch, which was chosen before the images were read, is not more than could be read.

    Args:
        config: With the choice.
        num_images: Images that could be read.
        world_size: Ranks that share a batch.
        say: Prints a line.
    """
    if config.data.batch_size <= num_images or num_images < 2:
        return config
    config = copy.deepcopy(config)
    config.data.batch_size = batch_size(num_images, world_size)
    say(f"--data.batch_size {config.data.batch_size}, because no more than {num_images} of the images can be read")
    return config


def _gray_heads(num_clusters: int) -> dict[str, Choice]:
    """Choose what the heads learn from gray images: to cluster from the first step on, and once more at the end."""
    return {
        "model.num_overclusters": Choice(3 * num_clusters, "three times the clusters"),
        NEIGHBOURS: Choice(STEPS, "new heads at the end, from each image and its nearest ones"),
    }


def _contrast_first() -> dict[str, Choice]:
    """Choose what the heads learn from colour images: contrast alone, then clusters from neighbours in the features."""
    return {
        "train.contrastive_warmup_epochs": Choice(_ALL_EPOCHS, "contrast alone, in all epochs"),
        "loss.temperature": Choice(0.2, "of the contrast"),
        NEIGHBOURS: Choice(STEPS, "then clusters, from each image and its nearest ones"),
    }


def _smaller_views(size: int) -> dict[str, Choice]:
    return {
        "views.size": Choice(3 * size // 4, "three quarters of the side take half the time"),
        "views.evaluate_size": Choice(size, "whole images at their own size"),
    }


def frozen_settings(backbone: str) -> dict[str, Choice]:
    """Choose settings for the features of a frozen pretrained backbone, "group.field" by name."""
    side = min(LARGEST_SIDE, preprocessing(backbone).input_size)
    return {
        "model.backbone": Choice(backbone, "pretrained: it has seen more photographs than a folder holds"),
        "model.pretrained": Choice(True, "its weights from this machine or, said beforehand, from the network"),
        "model.freeze_backbone": Choice(True, "stays as it is: each image is looked at once"),
        "train.epochs": Choice(0, "no training on views of the images"),
        NEIGHBOURS: Choice(STEPS, "heads learn from each image and its nearest ones"),
        "data.image_size": Choice(side, f"as the weights want it, up to {LARGEST_SIDE}"),
        "views.policy": Choice("simclr", "an evaluation sees the whole image"),
    }


def choose(
    config: Config, asked: frozenset[str] = frozenset(), *, say: Callable[[str], None], world_size: int = 1
) -> dict[str, Any]:
    """Choose settings for the folder or the features that `config.data.name` names, and say what and why.

    Colour photographs get the features of a frozen pretrained backbone where its weights can be had, and nothing that
    is asked for speaks against it.

    Args:
        config: What is asked for so far.
        asked: Names of what options or a named file set.
        say: Prints a line.
        world_size: Ranks of the run.

    Returns:
        Values by "group.field"; none where the folder has no image that can be read.
    """
    data, model = config.data, config.model
    if data.name.startswith("features:"):
        return {"train.epochs": 0, NEIGHBOURS: STEPS}
    root = Path(data.name.removeprefix("folder:")).expanduser()
    found = survey(
        root,
        listing_under(Path(data.cache or f"{data.root}/decoded"), root),
        data.relist,
        follow_links=data.follow_links,
        max_pixels=data.max_pixels,
        truncated=data.truncated,
    )
    if found is None:
        return {}
    backbone = _pretrained_backbone(config, found, asked)
    choices = {} if backbone is None else frozen_settings(backbone)
    missing, on_cpu = None, config.run.device == "cpu" or not torch.cuda.is_available()
    if backbone == DEFAULT and not asked & {"model.backbone", "model.pretrained", "model.weights"}:
        missing = what_is_missing(DEFAULT)
    if missing is not None or not choices:
        # Who sets a learning rate alone means the usual optimizer.
        optimizer = config.optim.name if asked & {"optim.name", "optim.lr"} else None
        choices = settings(found, data.image_size, data.channels, model.num_clusters, world_size, on_cpu, optimizer)
    kind = "in colour" if found.colour else "gray"
    say(
        f"{data.name}: {counted(found.num_images, 'image')}, {kind}, {found.side} px at the "
        f"median shorter side ({found.num_read} of {found.num_looked_at} that were looked at can be read). Chosen for "
        "them, unless an option or a file says otherwise:"
    )
    for name, choice in choices.items():
        if name not in asked:
            say(f"  --{name} {choice.value} ".ljust(40) + choice.reason)
    if choices["train.epochs"].reason == CPU_REASON and "train.epochs" not in asked:
        longer = 4 * choices["train.epochs"].value
        say(
            f"  (more time finds more: --train.epochs {longer} takes four times as long. CIFAR-10 from scratch came to "
            "0.52 in 58 minutes of one core, and to 0.56 in 6 minutes of a GPU, after 162 epochs of a ResNet-18)"
        )
    if missing is not None:
        say(f"  (pretrained features would sort photographs better, but {missing}. Training from scratch instead)")
    elif backbone is None:
        say("  (objects at any angle: --views.rotation 180 --views.flip 0.5; more recipes in docs/own-images.md)")
    return {name: choice.value for name, choice in choices.items()}


def _pretrained_backbone(config: Config, found: Survey, asked: frozenset[str]) -> str | None:
    """Name the backbone whose features are to be clustered as they are; None where a network is to be trained.

    It is the one that is asked for with weights, frozen, or of timm; else for colour photographs the default.
    """
    model, train = config.model, config.train
    trained = "train.epochs" in asked and train.epochs > 0
    thawed = "model.freeze_backbone" in asked and not model.freeze_backbone
    untrained = "model.pretrained" in asked and not model.pretrained and model.weights is None
    gray = config.data.channels == 1 or ("views.sobel" in asked and config.views.sobel)
    if trained or thawed or untrained or gray:
        return None
    if "model.backbone" in asked:
        frozen = model.freeze_backbone and config.pretrained
        return model.backbone if frozen or model.backbone.startswith(PREFIX) else None
    return DEFAULT if found.colour and found.side > _PHOTOGRAPH_SIDE else None
