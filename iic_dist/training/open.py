"""The right trainer for a config: on images, or on features as they are."""

from __future__ import annotations

import torch

from iic_dist.config import Config
from iic_dist.config.build import load_data
from iic_dist.device import exact_device
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.training.feature_trainer import FeatureTrainer
from iic_dist.training.features import load_run_features
from iic_dist.training.trainer import Trainer


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
    if device.type == "mps" and config.train.precision == "float64":
        raise UsageError("train.precision='float64': MPS has no float64; use --run.device cpu")
    if config.of_features:
        return FeatureTrainer(config, load_run_features(config, place, device), place, exact_device(device))
    return Trainer(config, load_data(config, place), place, device)
