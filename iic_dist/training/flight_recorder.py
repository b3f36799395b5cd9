"""What NCCL's flight recorder leaves when a collective waits too long, read without running any of it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iic_dist.distributed import FLIGHT_RECORDER
from iic_dist.training.rank_record import FOLDER


@dataclass(frozen=True)
class Waiting:
    """The oldest collective that a rank has begun and not ended, as its flight recorder says.

    Attributes:
        rank: Whose file it is.
        collective: Its name with its number in its group and the sizes of what goes in; None where none is open.
        caller: The line of ours that called it, as file:line; "" where none is named.
        number: Of the last collective that it has called in any group; one that is behind has a lower one.
    """

    rank: int
    collective: str | None
    caller: str
    number: int


class _Plain(pickle.Unpickler):
    """Reads numbers, texts and what they are in, as torch writes them; a file that wants more is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants {module}.{name}, and a flight recorder's file holds plain values alone")


def read_dumps(folder: Path) -> tuple[list[Waiting], list[str]]:
    """Read the flight recorders' files in the folder of a run.

    Returns:
        What they say by rank, and a line for each that cannot be read.
    """
    found, refused = [], []
    for path in sorted((folder / FOLDER).glob(f"{FLIGHT_RECORDER}*")):
        rank = path.name.removeprefix(FLIGHT_RECORDER)
        try:
            with path.open("rb") as file:
                found.append(_waiting(int(rank), _Plain(file).load()))
        except Exception as error:  # whatever a file that only claims to be one makes of the reader
            refused.append(f"{path} cannot be read: {[*str(error).splitlines(), type(error).__name__][0]}")
    return sorted(found, key=lambda each: each.rank), refused


def _waiting(rank: int, dump: Mapping[str, Any]) -> Waiting:
    entries = dump["entries"]
    last = max((int(each["collective_seq_id"]) for each in entries), default=0)
    waiting = [each for each in entries if not _is_done(each)]
    if not waiting:
        return Waiting(rank, None, "", last)
    first = waiting[0]
    sizes = ", ".join(" x ".join(map(str, size)) or "one" for size in first["input_sizes"])
    collective = f"{first['profiling_name']} number {first['collective_seq_id']} of {sizes} numbers"
    return Waiting(rank, collective, _caller(first.get("frames", [])), last)


def _is_done(entry: Mapping[str, Any]) -> bool:
    """Whether a collective has ended; gloo has no events that tell, there it is retired."""
    if entry["profiling_name"].startswith("nccl:"):
        return entry["state"] == "completed"
    return bool(entry["retired"])


def _caller(frames: list[Mapping[str, Any]]) -> str:
    for frame in frames:
        _, inside, file = str(frame["filename"]).rpartition("iic_dist/")
        if inside and file != "distributed.py":
            return f"{file}:{frame['line']}"
    return ""
