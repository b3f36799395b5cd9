"""From a config and its images to one in which nothing is left to choose."""

from __future__ import annotations

import copy
import math
from pathlib import Path

from iic_dist.config import Config
from iic_dist.config.build import build_views
from iic_dist.data.features import FeatureSet
from iic_dist.data.image_set import ImageSet
from iic_dist.errors import UsageError


def read_sizes(path: str) -> list[float]:
    """Read relative cluster sizes, one a line.

    Raises:
        UsageError: no such file, or a line that is not a number above 0.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not text, or a path with a NUL
        raise UsageError(
            f"loss.prior={path!r}: must be uniform, free, or a file of sizes, one a line ({error})"
        ) from error
    sizes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            sizes.append(float(line))
        except ValueError:
            sizes.append(math.nan)
        if not (0 < sizes[-1] < math.inf):
            raise UsageError(f"loss.prior={path!r}: line {number} is {line[:40]!r}, but must be a number above 0")
    return sizes


def complete(config: Config, train: ImageSet | FeatureSet) -> Config:
    """Return a copy of `config` in which nothing is left to be chosen from the images, or from features.

    What it says of the images is enough to build the network and its input again without them.

    Raises:
        UsageError: there is one image alone; the number of clusters is not given and the images have no classes to
            count; or the images have another size or other channels than the config says.
    """
    config = copy.deepcopy(config)
    count = len(train) if isinstance(train, FeatureSet) else len(train.images)
    if count < 2:
        raise UsageError(f"{train.name} holds {count} image that can be read: there is nothing to cluster")
    if config.model.num_clusters is None:
        if train.num_classes < 2:
            raise UsageError(
                f"{train.name} has no classes to count: say how many clusters you want with --model.num_clusters"
            )
        config.model.num_clusters = train.num_classes
    if isinstance(config.loss.prior, str) and config.loss.prior not in ("uniform", "free"):
        config.loss.prior = read_sizes(config.loss.prior)
    _check_prior(config)
    shape = train.image_shape if isinstance(train, FeatureSet) else tuple(train.images.shape[1:])
    if shape is None:
        return config  # no images, no views
    channels, image_size = shape[0], shape[-1]
    for name, asked, there in (
        ("image_size", config.data.image_size, image_size),
        ("channels", config.data.channels, channels),
    ):
        if asked not in (None, there):
            raise UsageError(f"data.{name}={asked}: the images of {train.name!r} have their own, {there}: leave it out")
    config.data.image_size, config.data.channels = image_size, 1 if channels == 1 else 3
    views = build_views(config)
    config.views.size = views.size
    if isinstance(train, FeatureSet):
        return config  # whose weights said what they want to see
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
