"""Train: `python -m iic_dist.train`, or `torchrun --nproc_per_node=8 -m iic_dist.train`; `--help` lists all options."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch
import yaml

from iic_dist import distributed, metrics, report
from iic_dist.build import load_data, run_folder
from iic_dist.command_line import parse
from iic_dist.config import Config
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.ops import backend, iic, nt_xent
from iic_dist.trainer import Trainer

# What a run may be gone on with under another value of.
MAY_CHANGE = {
    *("run.name", "run.root", "run.device", "run.threads", "run.resume", "run.timeout_minutes"),
    *("data.root", "data.download", "data.evaluate_on", "loss.impl", "train.epochs", "train.compile"),
    *("train.evaluate_every", "train.evaluate_batch_size", "train.checkpoint_every"),
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
    """Say which losses run, and why not the compiled ones.

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
    return ", ".join(names) + (f" ({backend.WHY_NOT_FUSED})" if backend.WHY_NOT_FUSED else "")


def open_folder(config: Config, trainer: Trainer, place: Place) -> Path:
    """Choose the folder of the run, go on from what it holds, and write what was asked.

    Raises:
        UsageError: the folder holds a run that was asked for otherwise, or that must not be touched.
    """
    folder = run_folder(config)
    asked = folder / "config.yaml"
    if asked.exists():
        if config.run.resume == "never":
            raise UsageError(f"{folder} is there: choose another --run.name, or --run.resume auto to go on with it")
        _same_run(trainer.config, asked)
    distributed.barrier()
    if trainer.resume(folder):
        say(place, f"going on after epoch {trainer.epoch}, step {trainer.step}")
    if place.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        trainer.config.run.name = folder.name
        asked.write_text(trainer.config.to_yaml())
        if trainer.data.unreadable:
            lines = "".join(f"{path}\t{reason}\n" for path, reason in trainer.data.unreadable)
            (folder / "unreadable.txt").write_text(lines)
            say(
                place,
                f"{len(trainer.data.unreadable)} unreadable files, named in {folder / 'unreadable.txt'}",
            )
    return folder


def _same_run(config: Config, asked: Path) -> None:
    """Raise a UsageError if the run in a folder cannot be gone on with under this config."""
    before, now = yaml.safe_load(asked.read_text()), yaml.safe_load(config.to_yaml())
    for group, fields in now.items():
        for name, value in fields.items():
            old = before.get(group, {}).get(name)
            if old != value and f"{group}.{name}" not in MAY_CHANGE and group != "monitor":
                raise UsageError(
                    f"{asked.parent} was trained with {group}.{name}={old!r}, not {value!r}: choose another --run.name"
                )


def compare_with_kmeans(trainer: Trainer, num_clusters: int) -> None:
    """Print what k-means on the pixels makes of the evaluation images, if they have labels."""
    evaluated = trainer.data.evaluation
    if evaluated.labels is not None:
        share = metrics.kmeans_accuracy(evaluated.images, evaluated.labels, num_clusters)
        print(f"accuracy {share:.4f} by k-means on the pixels", flush=True)


def train(config: Config, place: Place) -> None:
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
        result = trainer.train(folder)
        say(place, f"\n{report.summary(result)}")
        if config.monitor.kmeans and place.is_main:
            compare_with_kmeans(trainer, result["num_clusters"])
        say(place, f"run: {folder}    look at it: tensorboard --logdir {folder.parent}")
    finally:
        distributed.stop()


def main() -> None:
    """Parse, train, and turn a caller's mistake into one line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    place = Place.from_environment()
    try:
        train(parse(), place)
    except UsageError as error:
        if place.local_rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
