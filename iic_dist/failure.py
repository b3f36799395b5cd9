"""What it means that a collective failed: which one, who called it, and which rank nothing is heard of."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from iic_dist import distributed
from iic_dist.distributed import Place

_PACKAGE = Path(__file__).parent
_COLLECTIVES = "distributed.py"

PATIENCE = {"waited": 5.0, "broke": 2.0}
"""Seconds that a rank gives the others to say where they were when it failed."""


def kind_of_failure(said: str) -> str | None:
    """Tell from an error's words whether a collective "waited" too long or its connection "broke"; None for others."""
    if re.search(r"tim(ed|e) ?out", said, re.IGNORECASE):
        return "waited"
    if re.search(r"connection (was )?(closed|reset|refused)|broken pipe|socket", said, re.IGNORECASE):
        return "broke"
    return None


def why_it_failed(error: RuntimeError, place: Place) -> str | None:
    """Say in one line what a collective's error means and where to look; None for an error of another kind.

    Each rank that fails leaves a word in the store of the process group and waits a moment for those of the others;
    a rank without one is where the fault is.
    """
    said = " ".join(str(error).split())
    kind = kind_of_failure(said)
    if kind is None:
        return None
    own = which_collective(error)
    words = exchange_words(distributed.own_store(), place, own, PATIENCE[kind])
    what = {
        "waited": f"{own} waited longer than {distributed.own_patience()}",
        "broke": f"the connection to another rank broke in {own}",
    }
    return f"{what[kind]}. {_who(words, own, place, kind)} [{said[:200]}]"


def which_collective(error: BaseException) -> str:
    """Name the collective that an error came from, and who called it, by the frames of its traceback.

    Returns:
        Such as "all_reduce_sum in StepGuard.end (training/guard.py:116)".
    """
    collective = None
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    for code in codes:
        if Path(code.co_filename) == _PACKAGE / _COLLECTIVES:
            collective = collective or code.co_qualname.split(".")[0]
        elif Path(code.co_filename).is_relative_to(_PACKAGE):
            collective = None
    if collective is None:  # DDP's own, which our code does not call
        backward = any("autograd" in Path(code.co_filename).parts for code in codes)
        collective = "the average of the gradients" if backward else "a collective"
    return f"{collective} in {where_it_was(error)}"


def where_it_was(error: BaseException) -> str:
    """Name the function and line of ours that an error came from, the collectives themselves aside."""
    found = "code that is not ours"
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and path != _PACKAGE / _COLLECTIVES:
            found = f"{frame.f_code.co_qualname} ({path.relative_to(_PACKAGE).as_posix()}:{line})"
    return found


def exchange_words(store: dist.Store | None, place: Place, word: str, seconds: float) -> dict[int, str] | None:
    """Leave a word in the store, and return what other ranks have left there within some seconds.

    A thread asks, because a store whose process is suspended never answers.

    Args:
        store: Of the process group.
        place: This rank.
        word: Where it failed.
        seconds: How long the others have.

    Returns:
        The words by rank, this rank's aside; None where the store does not answer.
    """
    if store is None:
        return None
    found: dict[int, str] = {}
    answered = threading.Event()

    def ask() -> None:
        until = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # the store may go with the rank that owns it, which waited first
            store.set(f"failed/{place.rank}", word)
            count, heard = store.add("failed", 1), 1
            answered.set()
            while heard < place.world_size and time.monotonic() < until:
                if count > heard:
                    others = (rank for rank in range(place.world_size) if rank != place.rank)
                    there = [rank for rank in others if store.check([f"failed/{rank}"])]
                    found.update({rank: store.get(f"failed/{rank}").decode() for rank in there})
                    heard = count
                time.sleep(0.1)
                count = store.add("failed", 0)

    thread = threading.Thread(target=ask, daemon=True, name="words")
    thread.start()
    thread.join(seconds + 3)
    return dict(found) if answered.is_set() else None


def _who(words: Mapping[int, str] | None, own: str, place: Place, kind: str) -> str:
    """Say which ranks are silent, or that all wait, in one place or in several."""
    look = "look at its machine and its log (torchrun --log-dir)"
    if words is None:
        return f"The store of the process group does not answer either: begin with rank 0's machine; {look}."
    silent = [rank for rank in range(place.world_size) if rank != place.rank and rank not in words]
    if silent:
        names = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent[:16]))}{', ...' * (len(silent) > 16)}"
        means = "hangs, was suspended, or lost its network" if kind == "waited" else "died first, or lost its network"
        return f"Nothing is heard of {names}, which {means}: {look}."
    elsewhere = {rank: word for rank, word in words.items() if word != own}
    if elsewhere:
        rank, word = next(iter(elsewhere.items()))
        return f"Rank {rank} was in {word}: the ranks do not do the same; this is a bug, please report it."
    return "All ranks were there: the network between them is lost, or slow."
