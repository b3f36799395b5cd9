"""Train: `python -m iic_dist.train`, or `torchrun --nproc_per_node=8 -m iic_dist.train`; `--help` lists all options."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path

import torch
import yaml

from iic_dist import distributed
from iic_dist.config import folder
from iic_dist.evaluation import metrics
from iic_dist.training import report
from iic_dist.config.build import load_data, run_folder
from iic_dist.config.command_line import parse
from iic_dist.config import Config
from iic_dist.distributed import Place
from iic_dist.errors import RunError, UsageError
from iic_dist.files import write_whole
from iic_dist.ops import iic, nt_xent
from iic_dist.training.resume import PREEMPTED
from iic_dist.training.stop import StopSignals
from iic_dist.training.trainer import Trainer

# What a run may be gone on with under another value of.
MAY_CHANGE = {
    *("run.name", "run.root", "run.device", "run.threads", "run.resume", "run.timeout_minutes"),
    *("data.root", "data.download", "data.evaluate_on", "data.cache", "data.workers", "data.relist"),
    "data.device_budget_gib",
    *("loss.impl", "views.impl", "train.epochs", "train.compile"),
    *("train.evaluate_every", "train.evaluate_batch_size", "train.max_skipped_steps"),
    *("train.checkpoint_every", "train.checkpoint_every_steps"),
}


def say(place: Place, line: str) -> None:
    """Print a line on rank 0."""
    if place.is_main:
        print(line, flush=True)


def use_threads(config: Config, place: Place) -> None:
    """Share the machine's cores among its ranks; torchrun by itself leaves one thread to each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.run.threads or max(1, cores // place.local_world_size))


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


def open_folder(config: Config, trainer: Trainer, place: Place) -> Path:
    """Choose the folder of the run, go on from what it holds, and write what was asked; rank 0 looks and decides.

    Raises:
        UsageError: the folder holds a run that was asked for otherwise, or that must not be touched.

    Collective: all ranks must call.
    """
    folder = run_folder(config)
    if problem := distributed.broadcast(_why_not(folder, trainer.config) if place.is_main else None):
        raise UsageError(problem)
    if trainer.resume(folder):
        say(place, f"going on after epoch {trainer.epoch}, step {trainer.step}")
    if place.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        trainer.config.run.name = folder.name
        write_whole(folder / "config.yaml", trainer.config.to_yaml().encode())
        (folder / PREEMPTED).unlink(missing_ok=True)
        if unreadable := trainer.data.unreadable:
            lines = "".join(f"{path}\t{reason}\n" for path, reason in unreadable)
            (folder / "unreadable.txt").write_text(lines)
            say(place, f"{len(unreadable)} unreadable files, named in {folder / 'unreadable.txt'}")
    return folder


def _why_not(folder: Path, config: Config) -> str | None:
    """Say why the run in a folder cannot be gone on with under this config; None where it can, or there is none."""
    asked = folder / "config.yaml"
    if not asked.exists():
        return None
    if config.run.resume == "never":
        return f"{folder} is there: choose another --run.name, or --run.resume auto to go on with it"
    try:
        before = yaml.safe_load(asked.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"{asked} cannot be read ({' '.join(str(error).split())}): choose another --run.name"
    if not isinstance(before, dict):
        return f"{asked} is not the config of a run: choose another --run.name"
    for group, fields in yaml.safe_load(config.to_yaml()).items():
        for name, value in fields.items():
            old = (before.get(group) or {}).get(name)
            if old != value and f"{group}.{name}" not in MAY_CHANGE and group != "monitor":
                return f"{folder} was trained with {group}.{name}={old!r}, not {value!r}: choose another --run.name"
    return None


def compare_with_kmeans(trainer: Trainer, num_clusters: int) -> None:
    """Print what k-means on the pixels makes of the evaluation images, if they have labels."""
    evaluated = trainer.data.evaluation
    if evaluated.labels is not None:
        share = metrics.kmeans_accuracy(evaluated.images, evaluated.labels, num_clusters)
        print(f"accuracy {share:.4f} by k-means on the pixels", flush=True)


def train(config: Config, place: Place, stop: StopSignals) -> None:
    """Run the whole training of a config on this rank.

    Collective: all ranks must call.
    """
    device = distributed.choose_device(config.run.device, place)
    use_threads(config, place)
    distributed.start(place, device, config.run.timeout_minutes)
    try:
        losses = choose_losses(config, device)
        trainer = Trainer(config, load_data(config, place), place, device)
        folder = open_folder(config, trainer, place)
        threads = f", {torch.get_num_threads()} thread(s) each" if device.type == "cpu" else ""
        say(place, f"{folder}: {place.world_size} rank(s) on {device.type}{threads}; losses: {losses}")
        result = trainer.train(folder, stop)
        if result is None:
            say(place, f"stopped and saved after step {trainer.step}: the same command goes on from there")
            return
        say(place, f"\n{report.summary(result)}")
        if config.monitor.kmeans and place.is_main:
            compare_with_kmeans(trainer, result["num_clusters"])
        say(place, f"run: {folder}    look at it: tensorboard --logdir {folder.parent}")
    finally:
        distributed.stop()


def main() -> None:
    """Parse, train, and turn what a caller can mend into one line; exit with 2 for a mistake, 1 for a failed run.

    A signal to stop that comes before the first step, as while images are decoded, is heeded after that step.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    place = Place.from_environment()
    with StopSignals() as stop:
        try:
            train(parse(choose=partial(folder.choose, say=partial(say, place))), place, stop)
        except UsageError as error:
            fail(place, error, 2)
        except (RunError, OSError) as error:
            fail(place, error, 1)
        except RuntimeError as error:
            if (why := distributed.why_it_failed(error)) is None:
                raise
            print(f"error: rank {place.rank}: {why}", file=sys.stderr, flush=True)
            sys.exit(1)


def fail(place: Place, error: Exception, code: int) -> None:
    """Print the line of an error, once a machine, and exit."""
    if place.local_rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
