"""The folder of a run: its name, whether it can be gone on with, and what is written into it first."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from iic_dist import distributed
from iic_dist.config import Config
from iic_dist.config.command_line import parse
from iic_dist.config.console import say
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.files import write_whole
from iic_dist.training.feature_trainer import FeatureTrainer
from iic_dist.training.resume import PREEMPTED
from iic_dist.training.stages import STAGES
from iic_dist.training.trainer import Trainer


def run_folder(config: Config) -> Path:
    """Choose the folder of the run: its name, or the data set's name and the next free number.

    A restart by torchrun goes on in the newest folder of that name instead of opening another.

    Raises:
        UsageError: the name is not a plain file name.

    Collective: all ranks must call; rank 0's answer counts.
    """
    root = Path(config.run.root)
    name = config.run.name
    if name is not None and (not re.fullmatch(r"[A-Za-z0-9._-]+", name) or set(name) == {"."}):
        raise UsageError(f"run.name={name!r}: use letters, digits, '.', '_' and '-' alone")
    if name is None and distributed.rank() == 0:
        folder = config.data.name.removeprefix("folder:").rstrip("/").rsplit("/", 1)[-1]
        stem = re.sub(r"[^A-Za-z0-9]+", "-", folder).strip("-") or "run"
        name = _numbered(root, stem, reuse=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)
    return root / str(distributed.broadcast(name))


def _numbered(root: Path, stem: str, reuse: bool) -> str:
    """Open the folder STEM-N of the next free number N, or name the newest one where that is to be gone on with."""
    taken = [path.name.removeprefix(f"{stem}-") for path in root.glob(f"{stem}-*")]
    newest = max((int(number) for number in taken if number.isdecimal()), default=0)
    if reuse and newest:
        return f"{stem}-{newest}"
    while True:  # another run may take the number first
        newest += 1
        try:
            (root / f"{stem}-{newest}").mkdir(parents=True)
        except FileExistsError:
            continue
        return f"{stem}-{newest}"


CONFIG = "config.yaml"
"""What was asked for, complete; in the folder of a run."""

# What a run may be gone on with under another value of.
MAY_CHANGE = {
    *("run.name", "run.root", "run.device", "run.threads", "run.resume", "run.timeout_minutes"),
    *("data.root", "data.download", "data.evaluate_on", "data.labels", "data.cache", "data.workers", "data.relist"),
    *("data.device_budget_gib", "model.weights"),  # the digest of the weights must stay
    *("loss.impl", "views.impl", "train.epochs", "train.compile"),
    *("train.evaluate_every", "train.evaluate_batch_size", "train.max_skipped_steps"),
    *("train.checkpoint_every", "train.checkpoint_every_steps"),
}

# What each later stage trains on; it may change until that stage has begun.
_FIXED_BY = {"neighbours": ("train.epochs", "neighbours."), "refine": ("refine.",)}


def settings_of_unfinished(config: Config) -> Config | None:
    """Read what the run that is gone on with under this config was trained with; None where there is no such run."""
    name = config.run.name
    if name is None or not (Path(config.run.root) / name / CONFIG).is_file():
        return None
    try:
        return settings_of(Path(config.run.root) / name)
    except UsageError:
        return None  # `open_folder` says what is wrong with it


def open_folder(config: Config, trainer: Trainer | FeatureTrainer, place: Place) -> Path:
    """Choose the folder of the run, go on from what it holds, and write what was asked; rank 0 looks and decides.

    Raises:
        UsageError: the folder holds a run that was asked for otherwise, or that must not be touched.

    Collective: all ranks must call.
    """
    folder = run_folder(config)
    problem, changed = distributed.broadcast(_look(folder, trainer.config) if place.is_main else (None, []))
    if problem:
        raise UsageError(problem)
    if trainer.resume(folder):
        if problem := _too_late(folder, trainer.stage, changed):
            raise UsageError(problem)
        say(place, f"going on after epoch {trainer.epoch}, step {trainer.step}")
    if place.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        trainer.config.run.name = folder.name
        write_whole(folder / CONFIG, trainer.config.to_yaml().encode())
        (folder / PREEMPTED).unlink(missing_ok=True)
        if unreadable := trainer.data.unreadable:
            lines = "".join(f"{path}\t{reason}\n" for path, reason in unreadable)
            (folder / "unreadable.txt").write_text(lines)
            say(place, f"{len(unreadable)} unreadable files, named in {folder / 'unreadable.txt'}")
    return folder


Change = tuple[str, object, object]
"""GROUP.FIELD, its value before and now."""


def _look(folder: Path, config: Config) -> tuple[str | None, list[Change]]:
    """Say why the run in a folder cannot be gone on with under this config, if so, and list what this changes."""
    if not (folder / CONFIG).exists():
        return None, []
    if config.run.resume == "never":
        return f"{folder} is there: choose another --run.name, or --run.resume auto to go on with it", []
    try:
        before = dataclasses.asdict(settings_of(folder))
    except UsageError as error:
        return f"{error}: choose another --run.name", []
    changed = [
        (f"{group}.{name}", before[group][name], value)
        for group, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
        if before[group][name] != value
    ]
    for name, old, now in changed:
        if name not in MAY_CHANGE and not name.startswith(("monitor.", "neighbours.", "refine.")):
            return f"{folder} was trained with {name}={old!r}, not {now!r}: choose another --run.name", changed
    return None, changed


def _too_late(folder: Path, stage: str, changed: Sequence[Change]) -> str | None:
    """Say what has changed that a stage which has begun was trained with; None where nothing has."""
    for begun in STAGES[: STAGES.index(stage) + 1]:
        for name, before, now in changed:
            if name.startswith(_FIXED_BY.get(begun, ())):
                past = f"{folder} is past the start of {begun} with {name}={before!r}"
                return f"{past}, not {now!r}: choose another --run.name"
    return None


def settings_of(run: Path, changes: Sequence[str] = ()) -> Config:
    """Read the settings of a run from its folder; those that it does not know get their defaults.

    Args:
        run: Its folder, runs/NAME.
        changes: Options as those of the training that replace what the run was trained with.

    Raises:
        UsageError: it is not the folder of a run, or its config.yaml cannot be read.
    """
    asked = run / CONFIG
    if not asked.is_file():
        raise UsageError(f"{run}: not a run, there is no {asked}")
    try:
        return parse(["--config", str(asked), *changes])
    except OSError as error:
        raise UsageError(f"{asked} cannot be read ({error})") from error
