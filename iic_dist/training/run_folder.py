"""The folder of a run: its name, whether it can be gone on with, and what is written into it first."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iic_dist import distributed
from iic_dist.config import Config
from iic_dist.config.command_line import parse
from iic_dist.config.console import say
from iic_dist.data.listing import listed
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.files import write_whole
from iic_dist.training import owner
from iic_dist.training.feature_trainer import FeatureTrainer
from iic_dist.training.resume import PREEMPTED
from iic_dist.training.stages import STAGES
from iic_dist.training.trainer import Trainer
from iic_dist.wording import counted


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which this process owns.

    Attributes:
        path: Where it is.
        before: What was asked for when the run last began, complete; None for a new run.
    """

    path: Path
    before: Config | None


@contextlib.contextmanager
def claimed(config: Config, place: Place) -> Iterator[RunFolder]:
    """Choose the folder of the run and own it, before anything that takes long; rank 0 looks and decides.

    Raises:
        UsageError: it cannot be written, another process trains there, or it holds a run that must not be touched.

    Collective: all ranks must call.
    """
    launches = sorted({name for name in distributed.gather_objects(owner.launch()) if name is not None})
    with contextlib.ExitStack() as stack:
        found: RunFolder | str = ""
        if place.is_main:
            root = Path(config.run.root)
            if not root.exists():
                stack.callback(_remove_if_empty, root)  # after the folder of a run that never began
            try:
                path = run_folder(config, launches)
                found = stack.enter_context(_claimed(path, config, launches))
            except UsageError as error:
                found = str(error)
            except OSError as error:
                found = f"--run.root {config.run.root}: no run can be kept there ({error})"
        found = distributed.broadcast(found)
        if isinstance(found, str):
            raise UsageError(found)
        yield found


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _claimed(path: Path, config: Config, launches: list[str]) -> Iterator[RunFolder]:
    if config.run.resume == "never" and (path / CONFIG).exists():
        raise UsageError(f"{path} is there: choose another --run.name, or --run.resume auto to go on with it")
    # The others wait in a collective meanwhile.
    patience = min(100.0, 30 * config.run.start_timeout_minutes)
    with owner.owned(path, launches, patience):
        try:
            before = settings_of(path) if (path / CONFIG).exists() else None
        except UsageError as error:
            raise UsageError(f"{error}: choose another --run.name") from error
        yield RunFolder(path, before)


def run_folder(config: Config, launches: Sequence[str] = ()) -> Path:
    """Choose the folder of the run: its name, or the data set's name and the next free number.

    What torchrun starts again goes on in the folder that it began instead of opening another.

    Args:
        config: What is asked for.
        launches: What `owner.launch` says on all ranks.

    Raises:
        UsageError: the name is not a plain file name.
        OSError: no folder can be made.
    """
    root = Path(config.run.root)
    name = config.run.name
    if name is not None and (not re.fullmatch(r"[A-Za-z0-9._-]+", name) or set(name) == {"."}):
        raise UsageError(f"run.name={name!r}: use letters, digits, '.', '_' and '-' alone")
    if name is None:
        folder = config.data.name.removeprefix("folder:").rstrip("/").rsplit("/", 1)[-1]
        stem = re.sub(r"[^A-Za-z0-9]+", "-", folder).strip("-") or "run"
        name = _numbered(root, stem, launches)
    return root / name


def _numbered(root: Path, stem: str, launches: Sequence[str]) -> str:
    """Name the folder STEM-N that one of the launches has begun, or else open that of the next free number."""
    names = [path.name.removeprefix(f"{stem}-") for path in root.glob(f"{stem}-*")]
    taken = sorted((int(number) for number in names if number.isdecimal()), reverse=True)
    for number in taken if launches else ():
        last = owner.last_owner(root / f"{stem}-{number}")
        if last is not None and last.is_of(launches):
            return f"{stem}-{number}"
    newest = max(taken, default=0)
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
    *("run.name", "run.root", "run.device", "run.threads", "run.resume", "run.new_images", "run.timeout_minutes"),
    "run.start_timeout_minutes",
    *("data.root", "data.download", "data.evaluate_on", "data.labels", "data.cache", "data.workers", "data.relist"),
    *("data.device_budget_gib", "model.weights"),  # the digest of the weights must stay
    *("loss.impl", "views.impl", "train.epochs", "train.compile"),
    *("train.evaluate_every", "train.evaluate_batch_size", "train.max_skipped_steps"),
    *("train.checkpoint_every", "train.checkpoint_every_steps"),
}

# What is found out about the images, and then the run's.
_FOUND = {"data.image_size", "data.channels", "data.resampling", "model.num_clusters", "views.mean", "views.std"}

COMPLETED = {"loss.prior", "views.size", "model.pretrained", "model.weights_digest", *_FOUND}
"""What is found out before the training, and cannot be compared before that."""

# What each later stage trains on; it may change until that stage has begun.
_FIXED_BY = {"neighbours": ("train.epochs", "neighbours."), "refine": ("refine.",)}


Change = tuple[str, object, object]
"""GROUP.FIELD, its value before and now."""


def as_begun(config: Config, before: Config | None, chosen: Set[str], say: Callable[[str], None]) -> Config:
    """Return a copy of a config in which what nobody asks for is as the run began: other images would choose otherwise.

    Args:
        config: What is asked for.
        before: Of the run that is gone on with; None for a new one.
        chosen: Names "group.field" that are chosen from the images, or would be.
        say: Gets a line for each choice that differs.
    """
    config = copy.deepcopy(config)
    for name in sorted({*chosen, *_FOUND} if before is not None else ()):
        group, _, field = name.partition(".")
        now, then = (getattr(getattr(of, group), field) for of in (config, before))
        if now != then and (name in chosen or now is None):
            setattr(getattr(config, group), field, copy.deepcopy(then))
            if now is not None:
                say(f"--{name} {then}, as the run began; for the images as they are now: {now}")
    return config


def refuse_changes(folder: RunFolder, config: Config, passing: Set[str] = frozenset()) -> list[Change]:
    """List what a config changes of the run in a folder.

    Args:
        folder: Of the run.
        config: What is asked for.
        passing: Names "group.field" that are not looked at.

    Raises:
        UsageError: it changes what the run was trained with.
    """
    changed = [] if folder.before is None else _changes(folder.before, config)
    for name, old, now in changed:
        if name not in MAY_CHANGE | passing and not name.startswith(("monitor.", "neighbours.", "refine.")):
            raise UsageError(f"{folder.path} was trained with {name}={old!r}, not {now!r}: choose another --run.name")
    return changed


def open_folder(
    folder: RunFolder, trainer: Trainer | FeatureTrainer, state: Mapping[str, Any] | None, place: Place
) -> None:
    """Go on from what the folder holds, and write what was asked.

    Args:
        folder: Of the run.
        trainer: Of what is asked for.
        state: What `resume.load` has read in the folder.
        place: This rank; rank 0 writes.

    Raises:
        UsageError: the folder holds a run that was asked for otherwise.

    Collective: all ranks must call.
    """
    path = folder.path
    changed = refuse_changes(folder, trainer.config)
    if state is not None:
        trainer.go_on(path, state)
        if problem := _too_late(path, trainer.stage, changed):
            raise UsageError(problem)
        say(place, f"going on after epoch {trainer.epoch}, step {trainer.step}")
    if place.is_main:
        trainer.config.run.name = path.name
        write_whole(path / CONFIG, trainer.config.to_yaml().encode())
        (path / PREEMPTED).unlink(missing_ok=True)
        if unreadable := trainer.data.unreadable:
            write_whole(path / "unreadable.txt", listed(unreadable).encode())
            say(place, f"{counted(len(unreadable), 'unreadable file')}, named in {path / 'unreadable.txt'}")


def _changes(before: Config, now: Config) -> list[Change]:
    old = dataclasses.asdict(before)
    return [
        (f"{group}.{name}", old[group][name], value)
        for group, fields in dataclasses.asdict(now).items()
        for name, value in fields.items()
        if old[group][name] != value
    ]


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
