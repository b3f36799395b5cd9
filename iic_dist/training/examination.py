"""What the folder of a run says about how it went, and what to do next; nothing in it is changed."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iic_dist.config import Config
from iic_dist.failure import kind_of_failure
from iic_dist.training import checkpoint
from iic_dist.training.flight_recorder import Waiting, read_dumps
from iic_dist.training.rank_record import RankRecord, read_records
from iic_dist.training.resume import PREEMPTED
from iic_dist.training.run_folder import CONFIG, settings_of

_FRESH = 120.0
"""Seconds in which a rank on another machine takes a step, or is thought dead."""


@dataclass(frozen=True)
class Examination:
    """What was found in the folder of a run.

    Attributes:
        run: The folder.
        config: What was asked for.
        result: What result.json holds; None where the end was not reached.
        preempted: What PREEMPTED holds; None where no signal has stopped the run.
        good: The checkpoints that verify, newest first.
        damaged: Those that do not, and why.
        ranks: Where each rank was.
        waiting: What NCCL's flight recorders say.
        complaints: A line for each other file that cannot be read.
    """

    run: Path
    config: Config
    result: Mapping[str, Any] | None
    preempted: Mapping[str, Any] | None
    good: Sequence[Path]
    damaged: Mapping[Path, str]
    ranks: Sequence[RankRecord]
    waiting: Sequence[Waiting]
    complaints: list[str] = field(default_factory=list)

    @property
    def alive(self) -> list[RankRecord]:
        """Ranks whose process is there on this machine, or on another one, as far as one sees from here."""
        now = time.time()
        elsewhere = [each for each in self.ranks if each.is_there() is None and each.state == "training"]
        here = [each for each in self.ranks if each.is_there() in ("runs", "is suspended")]
        return here + [each for each in elsewhere if now - each.time < _FRESH]

    @property
    def lost(self) -> list[RankRecord]:
        """Ranks whose process on this machine ended without a word, as after kill -9."""
        return [each for each in self.ranks if each.state == "training" and each.is_there() == "is gone"]

    @property
    def is_well(self) -> bool:
        """Whether nothing is damaged, and no rank has failed, is suspended or is lost."""
        bad = [each for each in self.ranks if each.state == "failed" or each.is_there() == "is suspended"]
        return not (self.damaged or self.complaints or self.lost or bad)


def examine(run: Path) -> Examination:
    """Read the folder of a run; every checkpoint is read whole and verified.

    Raises:
        UsageError: it is not the folder of a run, or its config.yaml cannot be read.
    """
    config, complaints = settings_of(run), list[str]()
    ranks = read_records(run)
    waiting, refused = read_dumps(run)
    reasons = {path: checkpoint.why_not(path) for path in checkpoint.available(run / "checkpoints")}
    found = Examination(
        run=run,
        config=config,
        result=_json(run / "result.json", complaints),
        preempted=_json(run / PREEMPTED, complaints),
        good=[path for path, reason in reasons.items() if reason is None],
        damaged={path: reason for path, reason in reasons.items() if reason is not None},
        ranks=ranks,
        waiting=waiting,
        complaints=complaints + refused,
    )
    return found


def _json(path: Path, complaints: list[str]) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        complaints.append(f"{path} cannot be read: {error}")
        return None
    if not isinstance(found, Mapping):
        complaints.append(f"{path} cannot be read: it holds no object")
        return None
    return found


def report(found: Examination) -> list[str]:
    """List what was found, for a person, and last what to do next."""
    stages = sorted({each.stage for each in found.ranks if each.stage})
    lines = [f"{'run':12} {found.run}: {found.config.data.name}{', stage ' + ', '.join(stages) if stages else ''}"]
    lines.append(f"{'result.json':12} {_result(found.result)}")
    if found.preempted is not None:
        note = found.preempted
        lines.append(f"{PREEMPTED:12} {note.get('signal')} came: saved after step {note.get('step')}")
    newest = f", the newest is {found.good[0].name}" if found.good else ""
    lines.append(f"{'checkpoints':12} {len(found.good)} verify{newest}")
    lines += [f"{'DAMAGED':12} {path.name}: {reason}" for path, reason in found.damaged.items()]
    lines += [f"{f'rank {each.rank}':12} {_rank(each)}" for each in found.ranks]
    if not found.ranks:
        lines.append(f"{'ranks':12} none has left a record")
    lines += [f"{f'NCCL, rank {each.rank}':12} {_waiting(each)}" for each in found.waiting]
    lines += [f"{'UNREADABLE':12} {line}" for line in found.complaints]
    return lines + [f"{'next':12} {line}" for line in what_next(found)]


def _result(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "not there: the end was not reached"
    selected = (result.get("accuracy") or {}).get("selected")
    accuracy = "" if selected is None else f", accuracy {selected:.4f}"
    return f"the end was reached, {result.get('epochs')} epochs{accuracy}"


def _rank(rank: RankRecord) -> str:
    ago = max(0.0, time.time() - rank.time)
    there = rank.is_there()
    process = f"process {rank.pid} on {rank.host}{f' {there}' if rank.state == 'training' and there else ''}"
    line = f"step {rank.step}, {rank.state}, last heard of {_duration(ago)} ago; {process}"
    return f"{line}; {rank.why}" if rank.why else line


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _waiting(each: Waiting) -> str:
    if each.collective is None:
        return f"has ended every collective that it began, the last was number {each.number}"
    return f"waited in {each.collective}{f', called at {each.caller}' if each.caller else ''}"


def what_next(found: Examination) -> list[str]:
    """Say what to do next, the most pressing first."""
    suspended = [each for each in found.ranks if each.is_there() == "is suspended"]
    if suspended:
        names = ", ".join(f"rank {each.rank}: kill -CONT {each.pid}" for each in suspended)
        return [f"somebody has suspended a rank, and the others wait for it: {names}"]
    if found.alive and all(each.state == "training" for each in found.alive):
        return _of_a_run_that_runs(found)
    lines = _of_the_ranks(found)
    if found.damaged:
        folder = found.run / "checkpoints"
        lines.append(f"look at the disk of {folder}: damaged checkpoints are passed over, and may be deleted")
    if found.result is not None and found.preempted is None:
        return [
            *lines,
            f"nothing: use it, python -m iic_dist.predict --run {shlex.quote(str(found.run))} --images DIR ...",
        ]
    lines.append(_go_on(found))
    return lines


def _of_a_run_that_runs(found: Examination) -> list[str]:
    steps = [each.step for each in found.ranks]
    silent = time.time() - max(each.time for each in found.ranks)
    if silent < 60:
        return [f"nothing: it runs, and has done {min(steps)} steps"]
    behind = min(found.ranks, key=lambda each: each.step)
    hint = f"; rank {behind.rank} on {behind.host} is behind the others" if min(steps) < max(steps) else ""
    minutes = found.config.run.timeout_minutes
    return [
        f"wait, or look: no step for {_duration(silent)}{hint}. An evaluation or a slow disk may take so long; a rank "
        f"that hangs ends the run after {minutes:g} minutes"
    ]


def _of_the_ranks(found: Examination) -> list[str]:
    lines = []
    causes = [each for each in found.ranks if each.state == "failed" and kind_of_failure(each.why) is None]
    lines += [f"mend what rank {each.rank} failed of: {each.why}" for each in causes]
    if found.lost:
        names = ", ".join(f"rank {each.rank} (process {each.pid} on {each.host})" for each in found.lost)
        lines.append(f"{names} ended without a word: look for 'Out of memory: Killed process' in dmesg there")
    numbers = {each.rank: each.number for each in found.waiting}
    if numbers and min(numbers.values()) < max(numbers.values()):
        late = [str(rank) for rank, number in numbers.items() if number == min(numbers.values())]
        lines.append(f"rank {', '.join(late)} came to fewer collectives than the others: that one kept them waiting")
    absent = sorted({each.rank for each in found.ranks} - numbers.keys()) if numbers else []
    if absent:
        lines.append(f"rank {', '.join(map(str, absent))} left no flight recorder's file: begin there")
    return lines


def _go_on(found: Examination) -> str:
    step = None if not found.good else int(found.good[0].stem.rpartition("_")[2])
    done = max((each.step for each in found.ranks), default=step or 0)
    ranks = found.ranks[0].world_size if found.ranks else 1
    hosts = {each.host for each in found.ranks}
    config = shlex.quote(str(found.run / CONFIG))
    program = f"torchrun --nproc_per_node={ranks} -m" if ranks > 1 else "python -m"
    command = f"{program} iic_dist.train --config {config}" if len(hosts) < 2 else "as it was started"
    if step is None:
        return f"begin again, for no checkpoint verifies: {command}"
    lost = f", {done - step} steps are done again" if done > step else ""
    return f"go on from step {step}{lost}: {command}"
