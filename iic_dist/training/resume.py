"""What lets a run stop and go on later: rank 0 keeps its state in the folder of the run and reads it for all ranks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iic_dist import distributed
from iic_dist.errors import RunError
from iic_dist.files import write_whole
from iic_dist.training import checkpoint
from iic_dist.training.stages import STAGES

_logger = logging.getLogger(__name__)

PREEMPTED = "PREEMPTED"
"""Name of the file in the folder of a run that a signal has stopped before its end."""


def save(folder: Path, state: Mapping[str, Any], loss: float | None = None) -> bool:
    """Write a checkpoint on rank 0 and nothing on the others; return False if that failed.

    A full disk does not end the run: one line says that there is no new checkpoint.

    Args:
        folder: Of the run.
        state: With its "epoch" and "step", and its "stage", if that is not the first one.
        loss: What the best checkpoint of a stage is chosen by; None where no whole epoch has been measured.
    """
    if distributed.rank() != 0:
        return True
    try:
        stage = STAGES.index(state.get("stage", STAGES[0]))
        checkpoint.save(folder / "checkpoints", state["epoch"], state["step"], state, loss, stage)
    except OSError as error:
        _logger.error("no checkpoint of step %d: %s; the ones before it are intact", state["step"], error)
        return False
    return True


def save_last(folder: Path, state: Mapping[str, Any], loss: float | None = None) -> None:
    """Write the checkpoint that this process ends with; what came after the one before it is lost without it.

    Args:
        folder, state, loss: As for `save`.

    Raises:
        RunError: it could not be written.

    Collective: all ranks must call.
    """
    if not distributed.broadcast(save(folder, state, loss)):
        raise RunError(
            f"the state after step {state['step']} could not be saved: make room, and the same command goes on from "
            "the newest checkpoint"
        )


def leave_for_later(folder: Path, state: Mapping[str, Any], signal: str | None) -> None:
    """Save, and write the file PREEMPTED, by which a launcher knows that the run is to be gone on with.

    Args:
        folder: Of the run.
        state: As for `save`.
        signal: Name of the signal that this rank has received, if any.

    Raises:
        RunError: the state could not be saved.

    Collective: all ranks must call.
    """
    save_last(folder, state)
    note_stop(folder, state["step"], state["epoch"], signal)


def note_stop(folder: Path, step: int, epoch: int, signal: str | None) -> None:
    """Write the file PREEMPTED into a folder, which is made if it is not there.

    Args:
        folder: Of the run.
        step, epoch: How many are done.
        signal: Name of the signal that this rank has received, if any; at least one rank has.

    Collective: all ranks must call.
    """
    received = [name for name in distributed.gather_objects(signal) if name is not None]
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        note = {"step": step, "epoch": epoch, "signal": received[0]}
        write_whole(folder / PREEMPTED, (json.dumps(note) + "\n").encode())


def load(folder: Path, *, best: bool = False) -> dict[str, Any] | None:
    """Read on rank 0, for all ranks, the newest state that verifies, or the best; None where there is none.

    Collective: all ranks must call; broadcasts the state.
    """
    read = checkpoint.load_best if best else checkpoint.load_newest
    return distributed.broadcast(read(folder / "checkpoints") if distributed.rank() == 0 else None)
