"""Train: `python -m iic_dist.train`, or `torchrun --nproc_per_node=8 -m iic_dist.train`; `--help` lists all options."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from typing import Any

import torch

from iic_dist import distributed
from iic_dist.config import Config
from iic_dist.config.arithmetic import for_device, name_of_arithmetic
from iic_dist.config.command_line import parse
from iic_dist.config.console import errors_in_one_line, log_to_console, say
from iic_dist.config.folder import choose
from iic_dist.config.same import check_same
from iic_dist.config.weights import with_weights
from iic_dist.data.image_set import ImageSet
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.evaluation import metrics
from iic_dist.ops import iic, nt_xent
from iic_dist.training import report
from iic_dist.training.feature_trainer import FeatureTrainer
from iic_dist.training.open import open_trainer
from iic_dist.training.run_folder import open_folder, settings_of_unfinished
from iic_dist.training.stop import StopSignals
from iic_dist.training.trainer import Trainer


def choose_losses(config: Config, device: torch.device) -> str:
    """Say which losses run.

    Raises:
        UsageError: the compiled ones are asked for, and one that is needed is not there.
    """
    impl = config.loss.impl
    try:
        chosen = {"IIC": iic.implementation(impl, device) is not iic.TORCH}
        if "contrastive" in config.heads:
            chosen["NT-Xent"] = nt_xent.implementation(impl, device) is not nt_xent.TORCH
    except RuntimeError as error:
        raise UsageError(f"loss.{error}") from error
    names = [f"{name} {'fused' if fused else 'in PyTorch'}" for name, fused in chosen.items()]
    return ", ".join(names)


def compare_with_kmeans(trainer: Trainer | FeatureTrainer, num_clusters: int) -> None:
    """Print what k-means on the pixels makes of the evaluation images, if they have labels."""
    evaluated = trainer.data.evaluation
    if evaluated.labels is not None and isinstance(evaluated, ImageSet):
        share = metrics.kmeans_accuracy(evaluated.images, evaluated.labels, num_clusters)
        print(f"accuracy {share:.4f} by k-means on the pixels", flush=True)


def train(config: Config, place: Place, stop: StopSignals, chosen: Set[str] = frozenset()) -> None:
    """Run the whole training of a config on this rank.

    Args:
        config: What this rank was asked for; rank 0's counts.
        place: This rank.
        stop: Signals to heed.
        chosen: Names "group.field" that were chosen from the images, where ranks may have seen other ones.

    Raises:
        UsageError: something cannot be had or does not fit, or the ranks were asked for different things.

    Collective: all ranks must call.
    """
    device = distributed.choose_device(config.run.device, place)
    distributed.use_threads(config.run.threads, place)
    distributed.start(place, device, config.run.timeout_minutes)
    check_same(config, chosen)
    config = distributed.broadcast(for_device(config, device, settings_of_unfinished(config)))
    config = with_weights(config, place, partial(say, place))
    losses = choose_losses(config, device)
    trainer = open_trainer(config, place, device)
    folder = open_folder(config, trainer, place)
    threads = f", {torch.get_num_threads()} thread(s) each" if device.type == "cpu" else ""
    numbers = name_of_arithmetic(trainer.config)
    say(place, f"{folder}: {place.world_size} rank(s) on {device.type}{threads}, {numbers}; losses: {losses}")
    result = trainer.train(folder, stop)
    if result is None:
        say(place, f"stopped and saved after step {trainer.step}: the same command goes on from there")
        return
    say(place, f"\n{report.summary(result)}")
    if config.monitor.kmeans and place.is_main:
        compare_with_kmeans(trainer, result["num_clusters"])
    say(place, f"run: {folder}    look at it: tensorboard --logdir {folder.parent}")


def main() -> None:
    """Parse and train.

    A signal to stop that comes before the first step, as while images are decoded, is heeded after that step.
    """
    log_to_console()
    place = Place.from_environment()
    chosen: set[str] = set()

    def choosing(config: Config, asked: frozenset[str]) -> dict[str, Any]:
        found = choose(config, asked, say=partial(say, place), main=place.is_main)
        chosen.update(found.keys() - asked)
        return found

    with StopSignals() as stop, errors_in_one_line(place):
        train(parse(choose=choosing), place, stop, chosen)


if __name__ == "__main__":
    main()
