"""Train: `python -m iic_dist.train`, or `torchrun --nproc_per_node=8 -m iic_dist.train`; `--help` lists all options."""

from __future__ import annotations

import json
import logging
from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import Any

import torch

from iic_dist import distributed
from iic_dist.config import Config
from iic_dist.config.arithmetic import for_device, name_of_arithmetic
from iic_dist.config.build import RunData
from iic_dist.config.check import doubt_about_clusters
from iic_dist.config.command_line import parse, settings_in
from iic_dist.config.console import errors_in_one_line, log_to_console, say
from iic_dist.config.folder import CHOICES, choose, with_batch_that_fits
from iic_dist.config.same import check_same
from iic_dist.config.weights import with_weights
from iic_dist.data.image_set import ImageSet
from iic_dist.device import choose_device, use_threads
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.evaluation import metrics
from iic_dist.ops import iic, nt_xent
from iic_dist.training import report, resume
from iic_dist.training.feature_trainer import FeatureTrainer
from iic_dist.training.open import build_trainer, load_what_is_trained_on
from iic_dist.training.run_folder import COMPLETED, RunFolder, as_begun, claimed, open_folder, refuse_changes
from iic_dist.training.stop import Stopping, StopSignals
from iic_dist.training.trained_images import check_images
from iic_dist.training.trainer import Trainer
from iic_dist.wording import counted

_logger = logging.getLogger(__name__)


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
        chosen: Names "group.field" that were chosen from the images, or would be; rank 0's count.

    Raises:
        UsageError: something cannot be had or does not fit, or the ranks were asked for different things.

    Collective: all ranks must call.
    """
    device = choose_device(config.run.device, place)
    use_threads(config.run.threads, place)
    distributed.start(place, device, config.run.start_timeout_minutes)
    check_same(config, chosen)
    config, chosen = distributed.broadcast((config, frozenset(chosen)))
    with claimed(config, place) as folder:
        config = as_begun(config, folder.before, chosen, partial(say, place))
        config = distributed.broadcast(for_device(config, device, folder.before))
        _train_in(folder, config, chosen if folder.before is None else frozenset(), place, device, stop)


def _open(
    folder: RunFolder, config: Config, chosen: Set[str], place: Place, device: torch.device, stop: StopSignals
) -> Trainer | FeatureTrainer:
    """Make what trains in a folder that this process owns, and go on from what it holds; `chosen` may still change."""
    state = resume.load(folder.path)
    try:
        data = load_what_is_trained_on(config, place, device, stop)
    except Stopping:
        done = state or {"step": 0, "epoch": 0}
        resume.note_stop(folder.path, done["step"], done["epoch"], stop.received)
        raise
    if "data.batch_size" in chosen and isinstance(data, RunData):
        config = with_batch_that_fits(config, len(data.train.images), place.world_size, partial(say, place))
    seen, others = check_images(folder.path, state, data, config.run.new_images)
    trainer = build_trainer(config, data, place, device)
    trainer.images_seen = seen
    open_folder(folder, trainer, state, place)
    if others:
        trainer.take_new_images()
    return trainer


def _train_in(
    folder: RunFolder, config: Config, chosen: Set[str], place: Place, device: torch.device, stop: StopSignals
) -> None:
    path = folder.path
    refuse_changes(folder, config, COMPLETED)
    config = with_weights(config, place, partial(say, place))
    if config.pretrained:
        where = config.model.weights or "in the cache of this machine"
        say(place, f"weights of {config.model.backbone}: {where}, {config.model.weights_digest}")
    losses = choose_losses(config, device)
    try:
        trainer = _open(folder, config, chosen, place, device, stop)
    except Stopping:
        say(place, "stopped while a frozen network made features, which are not kept: the same command begins anew")
        return
    threads = f", {counted(torch.get_num_threads(), 'thread')} each" if device.type == "cpu" else ""
    where = f"{device.type}{threads}, {name_of_arithmetic(trainer.config)}"
    say(place, f"{path}: {counted(place.world_size, 'rank')} on {where}; losses: {losses}")
    if place.is_main and (doubt := doubt_about_clusters(trainer.config, len(trainer.trained_on))):
        _logger.warning("warning: %s", doubt)
    result = trainer.train(path, stop)
    if result is None:
        say(place, f"stopped and saved after step {trainer.step}: the same command goes on from there")
        return
    say(place, "", *report.summary(result).split("\n"))
    if config.monitor.kmeans and place.is_main:
        compare_with_kmeans(trainer, result["num_clusters"])
    say(place, f"run: {path}    look at it: tensorboard --logdir {path.parent}")


def read(arguments: list[str] | None, place: Place) -> tuple[Config, set[str]]:
    """Read a command line, and choose for its images what it leaves open.

    Args:
        arguments: Options; None takes the process's own.
        place: This rank.

    Returns:
        What is asked for, and `chosen` of `train`.

    Raises:
        UsageError: it cannot be read, or does not fit together.
    """
    chosen: set[str] = set()

    def choosing(config: Config, asked: frozenset[str]) -> dict[str, Any] | None:
        chosen.update(CHOICES - asked)
        if not place.is_main:  # its choices count for all, and to look takes long
            return None
        return choose(config, asked, say=partial(say, place), world_size=place.world_size)

    def on_cpu(config: Config, smaller: Path, asked: frozenset[str]) -> bool:
        chosen.update(settings_in(smaller).keys() - asked)
        if choose_device(config.run.device, place).type != "cpu":
            return False
        values = {name: value for name, value in settings_in(smaller).items() if name not in asked}
        listed = ", ".join(f"{name} {json.dumps(value)}".replace('"', "") for name, value in values.items())
        say(place, f"{smaller.name.partition('.')[0]} on a CPU: {listed}")
        return True

    return parse(arguments, choosing, on_cpu), chosen


def main() -> None:
    """Parse and train.

    A signal to stop that comes while images are decoded to be trained on is heeded after the first step.
    """
    log_to_console()
    place = Place.from_environment()
    with StopSignals() as stop, errors_in_one_line(place):
        config, chosen = read(None, place)
        train(config, place, stop, chosen)


if __name__ == "__main__":
    main()
