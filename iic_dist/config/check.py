"""Whether a config can work at all, before any image is read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from iic_dist.config import HEADS, Config
from iic_dist.data.features import noun_of
from iic_dist.errors import UsageError
from iic_dist.wording import counted


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise UsageError(f"{name}={value!r}: must be {rule}")


_BOUNDS = {
    "above 0": lambda value: value > 0,
    "0 or more": lambda value: value >= 0,
    "from 0 to 1": lambda value: 0 <= value <= 1,
}


def check(config: Config) -> None:
    """Raise a UsageError for the first value that no run could work with."""
    for group in dataclasses.fields(Config):
        values = getattr(config, group.name)
        for each in dataclasses.fields(values):
            _check_field(f"{group.name}.{each.name}", getattr(values, each.name), each)
    _require(0 <= config.run.seed < 2**63, "run.seed", config.run.seed, "from 0 to 2^63 - 1")
    batch = config.data.batch_size
    _require(batch >= 2, "data.batch_size", batch, "2 or more: one image alone has nothing to be told apart from")
    _check_heads(config)
    _require(config.refine.confidence < 1, "refine.confidence", config.refine.confidence, "below 1")


def check_course(config: Config) -> None:
    """Raise a UsageError where there is nothing to train, or nothing to cluster; counts for a command line's end."""
    data, model, epochs = config.data, config.model, config.train.epochs
    if config.refine.epochs and not config.neighbours.steps:
        raise UsageError(
            f"refine.epochs={config.refine.epochs}: refines heads that neighbours.steps trains; "
            "set --neighbours.steps 1000"
        )
    features = data.name.startswith("features:")
    if features and epochs:
        raise UsageError(
            f"train.epochs={epochs}: {data.name} are features as they are, and no network is trained on them: set 0"
        )
    if epochs == 0 and not features and not (config.pretrained and model.freeze_backbone):
        raise UsageError(
            "train.epochs=0: leaves an untrained network; with a pretrained one, frozen, its features are clustered "
            "(model.pretrained or model.weights, and model.freeze_backbone), or set 1 or more"
        )
    if data.labels is not None and not features:
        raise UsageError(f"data.labels={data.labels!r}: is for features:FILE.npy; a folder has data.folder_labels")
    if features and (config.pretrained or data.unlabelled):
        raise UsageError(f"{data.name}: features need no model.pretrained, model.weights or data.unlabelled")
    if epochs == 0 and not config.neighbours.steps:
        raise UsageError("train.epochs=0 and neighbours.steps=0: nothing is trained; set --neighbours.steps 1000")
    if config.of_features and data.unlabelled:
        raise UsageError("data.unlabelled=true: with train.epochs 0 no head trains on unlabelled images")


def doubt_about_clusters(config: Config, num_images: int) -> str | None:
    """Say what is odd about the number of clusters of a complete config, if so.

    Args:
        config: Complete.
        num_images: That it is trained on.
    """
    k, where = max(config.clustering_heads.values()), "data.batch_size"
    batch = config.data.batch_size
    if config.of_features:
        where, batch = "neighbours.batch_size", config.neighbours.batch_size
    if k > num_images:
        images = counted(num_images, noun_of(config.data.name))
        return f"model.num_clusters={k} of {images}: {k - num_images} or more will stay empty"
    if k > batch:
        return f"model.num_clusters={k} is above {where}={batch}: no step sees all clusters, and they may stay unequal"
    return None


def _check_field(name: str, value: Any, field: dataclasses.Field[Any]) -> None:
    # A file may say null where the parser lets it pass.
    _require(value is not None or field.default is None, name, value, "given")
    bound = field.metadata.get("bound")
    if bound is not None and value is not None:
        _require(math.isfinite(value) and _BOUNDS[bound](value), name, value, bound)


def _check_heads(config: Config) -> None:
    model, train = config.model, config.train
    clusters, over = model.num_clusters, model.num_overclusters
    if isinstance(clusters, list):
        _check_several(config, clusters)
    else:
        _require(clusters is None or clusters >= 2, "model.num_clusters", clusters, "2 or more")
    _require(over == 0 or over >= 2, "model.num_overclusters", over, "2 or more")
    unknown = [head for head in train.order if head not in HEADS]
    _require(not unknown, "train.order", train.order, f"made of {', '.join(HEADS)}")
    if train.schedule == "alternate":
        missing = [head for head in config.kinds if head not in train.order]
        _require(not missing, "train.order", train.order, f"complete; the model also has {', '.join(missing)}")
    if train.contrastive_warmup_epochs and "contrastive" not in config.kinds:
        raise UsageError(
            f"train.contrastive_warmup_epochs={train.contrastive_warmup_epochs}: there is no contrastive head; "
            "set model.projection_dim, e.g. 128"
        )
    if isinstance(config.loss.prior, list):
        good = bool(config.loss.prior) and all(0 < size < math.inf for size in config.loss.prior)
        _require(good, "loss.prior", config.loss.prior, "uniform, free, a file of sizes, or sizes above 0")
    if config.data.unlabelled and len(config.kinds) == 1:
        raise UsageError(
            "data.unlabelled=true: only the overclustering and contrastive heads use unlabelled images; "
            "set model.num_overclusters or model.projection_dim"
        )


def _check_several(config: Config, clusters: list[int]) -> None:
    good = len(clusters) >= 2 and min(clusters) >= 2 and len(set(clusters)) == len(clusters)
    _require(good, "model.num_clusters", clusters, "one number, or several different ones of 2 or more")
    sub_heads, prior = config.model.sub_heads, config.loss.prior
    if sub_heads < 3:
        raise UsageError(
            f"model.sub_heads={sub_heads}: to choose among several model.num_clusters, the agreement of at least 3 is "
            "compared"
        )
    if prior not in ("uniform", "free"):
        raise UsageError(f"loss.prior={prior!r}: sizes are those of one number of clusters, not of {clusters}")
