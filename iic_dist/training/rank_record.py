"""Where each rank of a run is: a small file of its own in the folder of the run, for who looks at it afterwards."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType

from iic_dist.distributed import Place
from iic_dist.failure import where_it_was

_log = logging.getLogger(__name__)

FOLDER = "ranks"
"""In the folder of a run: the records of its ranks, and what NCCL's flight recorder has left."""

_BYTES = 1024
_LONGEST_REASON = 400  # characters of ASCII, of which none takes more than two bytes


@dataclass(frozen=True)
class RankRecord:
    """What is known of a rank.

    Attributes:
        rank, world_size: Its place.
        host, pid: Where it runs.
        process_started: When, in ticks since the machine's start, which no other process of this number shares; 0
            where the system does not say.
        begun: When it began to train, in seconds since 1970.
        time: When this was written.
        stage: Of the run.
        step: Steps of the run that this rank has done.
        state: "training", "stopped" by a signal, "ended", or "failed".
        why: The error, where it failed.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    process_started: int
    begun: float
    time: float
    stage: str
    step: int
    state: str
    why: str

    def is_there(self) -> str | None:
        """Say how its process does on this machine: "runs", "is suspended", "is gone"; None where nobody here knows."""
        if self.host != platform.node():
            return None
        state, started = _process(self.pid)
        if state is None or started != self.process_started:
            return "is gone"
        return "is suspended" if state in "Tt" else "runs"


def _process(pid: int) -> tuple[str | None, int]:
    """Return the state of a process and when it started, in ticks; (None, 0) for one that is dead or not there."""
    try:
        # The name in parentheses may hold anything.
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None, 0
    return (words[0], int(words[19])) if words[0] not in "ZX" else (None, 0)


class RankLog:
    """Keeps the record of this rank, in place: a step costs one small write that nothing waits for.

    A disk that refuses does not end the run; one warning says that there is no record.

    Args:
        folder: Of the run, which all machines share.
        place: This rank.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        now = time.time()
        self._record = RankRecord(
            rank=place.rank,
            world_size=place.world_size,
            host=platform.node(),
            pid=os.getpid(),
            process_started=_process(os.getpid())[1],
            begun=now,
            time=now,
            stage="",
            step=0,
            state="training",
            why="",
        )
        self._file: int | None = None
        path = folder / FOLDER / f"rank_{place.rank:05d}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._write()
        except OSError as error:
            _log.warning("no record of where rank %d is: %s", place.rank, error)

    def at(self, step: int, stage: str) -> None:
        """Note that a step is done."""
        self._record = replace(self._record, step=step, stage=stage, time=time.time())
        with contextlib.suppress(OSError):
            self._write()

    def end(self, state: str, why: str = "") -> None:
        """Note how it ended, unless that is known already."""
        if self._file is None or self._record.state != "training":
            return
        plain = why.encode("ascii", "replace").decode()[:_LONGEST_REASON]
        self._record = replace(self._record, state=state, why=plain, time=time.time())
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        if self._file is not None:
            os.pwrite(self._file, f"{json.dumps(asdict(self._record)):<{_BYTES - 1}}\n".encode(), 0)

    def __enter__(self) -> RankLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.end("ended")
        else:
            said = " ".join(str(error).split())
            self.end("failed", f"{type(error).__name__} in {where_it_was(error)}: {said}")
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_records(folder: Path) -> list[RankRecord]:
    """Read the records of the ranks that a run had when it was last begun, by rank; files that are none are left out.

    Args:
        folder: Of the run.
    """
    found = [record for path in (folder / FOLDER).glob("rank_*.json") if (record := _read(path)) is not None]
    if not found:
        return []
    world_size = max(found, key=lambda record: record.begun).world_size
    return sorted((each for each in found if each.world_size == world_size), key=lambda record: record.rank)


def _read(path: Path) -> RankRecord | None:
    kinds = {"int": int, "float": int | float, "str": str}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, Mapping):
        return None
    known = {field.name: values.get(field.name) for field in fields(RankRecord)}
    good = all(isinstance(known[field.name], kinds[str(field.type)]) for field in fields(RankRecord))
    return RankRecord(**known) if good else None  # type: ignore[arg-type]
