"""The pretrained weights of a run: found before anything else, named by their digest, and what they want to see."""

from __future__ import annotations

import copy
from collections.abc import Callable

from iic_dist import distributed
from iic_dist.config import Config
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.models.pretrained import find_weights, preprocessing
from iic_dist.models.timm_backbones import PREFIX
from iic_dist.models.weights import digest

LARGEST_SIDE = 224
"""Pixels; weights made for larger images see this size too, at a fraction of the cost."""


def with_weights(config: Config, place: Place, say: Callable[[str], None]) -> Config:
    """Find the pretrained weights that a config asks for, and return a copy that says which, and what they want to see.

    Their normalisation, and for a folder size and resampling, where the config does not say otherwise. A backbone that
    is only looked through, `train.epochs` 0, gets images of its own size also from a named set.

    Args:
        config: What is asked for; without pretrained weights it comes back as it is.
        place: This rank; local rank 0 of a machine fetches what is missing.
        say: Gets a line before anything is fetched.

    Raises:
        UsageError: the weights are not there, are others than `model.weights_digest` says, or differ among machines.

    Collective: all ranks must call.
    """
    if not config.pretrained:
        return config
    config = copy.deepcopy(config)
    model, data, views = config.model, config.data, config.views
    with distributed.local_main_first(place):
        try:
            file = find_weights(model.backbone, model.weights, download=place.local_rank == 0, say=say)
        except UsageError as error:
            if model.weights_digest is None:
                raise
            raise UsageError(f"{error} (wanted: digest {model.weights_digest})") from error
        found = digest(file)
    everywhere = distributed.gather_objects(found)
    if len(set(everywhere)) > 1:
        other = next(rank for rank, each in enumerate(everywhere) if each != everywhere[0])
        raise UsageError(f"weights of {model.backbone} differ among machines: rank {other} has others than rank 0")
    if model.weights_digest not in (None, found):
        raise UsageError(
            f"model.weights_digest={model.weights_digest}: but {str(file)!r} has {found}; name the file that the "
            "run was made with by --model.weights"
        )
    model.pretrained, model.weights_digest = True, found
    wanted = preprocessing(model.backbone)
    side = min(LARGEST_SIDE, wanted.input_size)
    data.channels = data.channels or 3
    if data.name.startswith("folder:"):
        data.image_size = data.image_size or side
        data.resampling = data.resampling or wanted.resampling
    elif config.of_features and model.backbone.startswith(PREFIX):
        views.size = views.size or side
    if views.mean is None and views.std is None and not views.sobel:
        views.mean, views.std = list(wanted.mean), list(wanted.std)
    return config
