"""The right trainer for a config: on images, or on features as they are."""

from __future__ import annotations

import torch

from iic_dist.config import Config
from iic_dist.config.build import RunData, load_data
from iic_dist.device import exact_device
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.training.feature_trainer import FeatureTrainer
from iic_dist.training.features import RunFeatures, load_run_features
from iic_dist.training.guard import Poll
from iic_dist.training.stop import StopSignals
from iic_dist.training.trainer import Trainer


def load_what_is_trained_on(
    config: Config, place: Place, device: torch.device, stop: StopSignals | None = None
) -> RunData | RunFeatures:
    """Load the images of a config, or the features that it clusters as they are.

    Args:
        config: As `config.weights.with_weights` returns it.
        place: This rank.
        device: Where to compute features.
        stop: Signals to heed while a frozen network makes features, which may take long.

    Raises:
        UsageError: images, features or weights cannot be loaded.
        Stopping: a rank was asked to stop; nothing is left of the features.

    Collective: all ranks must call.
    """
    if device.type == "mps" and config.train.precision == "float64":
        raise UsageError("train.precision='float64': MPS has no float64; use --run.device cpu")
    if not config.of_features:
        return load_data(config, place)
    poll, stop = Poll(exact_device(device)), stop or StopSignals()
    return load_run_features(config, place, device, lambda: poll.heed(stop.received))


def build_trainer(
    config: Config, data: RunData | RunFeatures, place: Place, device: torch.device
) -> Trainer | FeatureTrainer:
    """Make what trains on the images or features of a config; see `load_what_is_trained_on`.

    Raises:
        UsageError: the config does not fit them, or the number of ranks.

    Collective: all ranks must call.
    """
    if isinstance(data, RunFeatures):
        return FeatureTrainer(config, data, place, exact_device(device))
    return Trainer(config, data, place, device)


def open_trainer(config: Config, place: Place, device: torch.device) -> Trainer | FeatureTrainer:
    """Load what a config is to be trained on, and make what trains on it.

    Args:
        config: As `config.weights.with_weights` returns it.
        place: This rank.
        device: Where to compute.

    Raises:
        UsageError: images, features or weights cannot be loaded, or the config does not fit them.

    Collective: all ranks must call.
    """
    return build_trainer(config, load_what_is_trained_on(config, place, device), place, device)
