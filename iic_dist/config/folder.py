"""Settings for a folder of images, chosen from the images; options and config files win over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iic_dist.config import Config
from iic_dist.data.survey import Survey, survey

_LARGEST_SIDE = 96
_SMALL_SIDE = 32
_FEWEST, _MOST_EPOCHS = {"small_cnn": 30, "resnet18": 50}, 400


@dataclass(frozen=True)
class Choice:
    """A value for a setting, and why."""

    value: Any
    reason: str


def settings(
    found: Survey, image_size: int | None, channels: int | None, num_clusters: int | list[int] | None
) -> dict[str, Choice]:
    """Choose settings, "group.field" by name.

    Args:
        found: What the images are like.
        image_size, channels, num_clusters: What the user asked for, None where nothing.
    """
    size = image_size or max(8, min(_LARGEST_SIDE, found.side))
    colour = found.colour if channels is None else channels == 3
    small = size <= _SMALL_SIDE and not colour
    backbone = "small_cnn" if small else "resnet18"
    batch = 256
    while batch > 16 and 8 * batch > found.num_images:
        batch //= 2
    while batch > max(1, found.num_images):
        batch //= 2
    seen = 120_000 if small else 1_000_000
    largest = max(num_clusters) if isinstance(num_clusters, list) else num_clusters or 10
    epochs = min(_MOST_EPOCHS, max(_FEWEST[backbone], round(seen / found.num_images)))
    kind = "in colour" if colour else "gray"
    policy = (
        Choice("simclr", "in colour: crops, mirror images, changes of colour")
        if colour
        else Choice("digits", "gray: slight turns, shifts and changes of contrast, no mirror images")
    )
    return {
        "data.image_size": Choice(size, f"the median shorter side, from 8 to {_LARGEST_SIDE}"),
        "data.batch_size": Choice(batch, "256, or less so that an epoch has eight steps, but not below 16"),
        "views.policy": policy,
        "model.backbone": Choice(
            backbone, f"{kind} and {'up to' if size <= _SMALL_SIDE else 'above'} {_SMALL_SIDE} px"
        ),
        "model.num_overclusters": Choice(3 * largest, "three times the clusters"),
        "model.projection_dim": Choice(128, "a contrastive head beside the clustering heads"),
        "loss.entropy_weight": Choice(2.0, "pushes towards clusters of equal size"),
        "optim.lr": Choice(2e-3 if small else 1e-3, f"with Adam and {backbone}"),
        "optim.schedule": Choice("cosine", "down to zero"),
        "train.epochs": Choice(
            epochs, f"about {seen:,} images seen, from {_FEWEST[backbone]} to {_MOST_EPOCHS} epochs"
        ),
        "train.evaluate_batch_size": Choice(256, "little memory"),
    }


def choose(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """Choose settings for the folder that `config.data.name` names, and say what and why.

    Args:
        config: What is asked for so far.
        say: Prints a line.

    Returns:
        Values by "group.field"; none where the folder has no image that can be read.
    """
    data = config.data
    found = survey(Path(data.name.removeprefix("folder:")).expanduser())
    if found is None:
        return {}
    choices = settings(found, data.image_size, data.channels, config.model.num_clusters)
    say(
        f"{data.name}: {found.num_images} images, {'in colour' if found.colour else 'gray'}, {found.side} px at the "
        f"median shorter side ({found.num_read} looked at). Chosen for them, unless an option or a file says otherwise:"
    )
    for name, choice in choices.items():
        say(f"  --{name} {choice.value}".ljust(40) + choice.reason)
    say("  (objects at any angle: --views.rotation 180 --views.flip 0.5; more recipes in docs/own-images.md)")
    return {name: choice.value for name, choice in choices.items()}
