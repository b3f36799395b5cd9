"""Checkpoints that are either whole or not there, and are verified before they are read."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from iic_dist.files import temporary_of, write_whole

_log = logging.getLogger(__name__)

KEEP = 3
_KINDS: dict[str, Any] = {"epoch": int, "step": int, "loss": int | float | None, "bytes": int, "sha256": str}
_NAME = re.compile(r"epoch_(\d{5,})_step_(\d{8,})\.pt")


def save(
    folder: Path, epoch: int, step: int, state: Mapping[str, Any], loss: float | None = None, stage: int = 0
) -> Path:
    """Write `state` as a checkpoint; keep the newest `KEEP` and the one of lowest loss.

    A manifest with the SHA-256 stands beside each checkpoint, because `torch.load` does not notice flipped bits. It
    is written first, so that no checkpoint is ever without. One that is there already and verifies is left alone.

    Args:
        folder: Made if it is not there.
        epoch: Epochs done.
        step: Steps done.
        state: Tensors, numbers, strings, lists and dicts, which `torch.load(weights_only=True)` reads back.
        loss: What the best is chosen by, the lowest; None where nothing has been measured.
        stage: Number of the stage that the loss is of. Those of two stages are different losses: a later stage counts.

    Raises:
        OSError: the disk is full or the folder cannot be written; older checkpoints are intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"epoch_{epoch:05d}_step_{step:08d}.pt"
    _remove_leftovers(folder)
    if not (path.exists() and why_not(path) is None):
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        manifest = {
            "epoch": epoch,
            "step": step,
            "loss": loss if loss is not None and math.isfinite(loss) else None,
            "stage": stage,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_whole(path.with_suffix(".json"), json.dumps(manifest).encode())
        try:
            write_whole(path, content)
        except OSError:
            _remove_leftovers(folder)
            raise
    _prune(folder)
    return path


def _remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it saved has left: temporaries, manifests of nothing."""
    for temporary in folder.glob(temporary_of(Path("*")).name):
        temporary.unlink(missing_ok=True)
    for manifest in folder.glob("epoch_*_step_*.json"):
        if not manifest.with_suffix(".pt").exists():
            manifest.unlink(missing_ok=True)


def _prune(folder: Path) -> None:
    newest_first = available(folder)
    kept = {*newest_first[:KEEP], *best_first(newest_first)[:1]}
    for path in newest_first:
        if path not in kept:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)


def available(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, newest first, without looking inside."""
    if not folder.is_dir():
        return []
    named = [(path, match) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for path, match in sorted(named, key=lambda pair: (int(pair[1][1]), int(pair[1][2])), reverse=True)]


def best_first(paths: Iterable[Path]) -> list[Path]:
    """List those of some checkpoints that have a loss: those of the last stage first, and of a stage the lowest."""
    ranks = {}
    for path in paths:
        try:
            manifest = _manifest(path)
        except (OSError, ValueError):
            continue
        if manifest["loss"] is not None:
            ranks[path] = (-manifest.get("stage", 0), manifest["loss"])  # none in those of before there were stages
    return sorted(ranks, key=lambda path: ranks[path])


def _manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, or raise ValueError or OSError."""
    try:
        manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its manifest is nested without end") from error
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), kind) for key, kind in _KINDS.items()):
        raise ValueError("its manifest is malformed")
    if not isinstance(manifest.get("stage", 0), int):
        raise ValueError("its manifest is malformed")
    if manifest["loss"] is not None and not math.isfinite(manifest["loss"]):
        raise ValueError(f"its manifest has a loss of {manifest['loss']}")
    if f"epoch_{manifest['epoch']:05d}_step_{manifest['step']:08d}.pt" != path.name:
        raise ValueError(f"its manifest is that of epoch {manifest['epoch']}, step {manifest['step']}")
    return manifest


def _verified_bytes(path: Path) -> bytes:
    """Read a checkpoint that is what its manifest says, or raise ValueError or OSError."""
    manifest = _manifest(path)
    size = path.stat().st_size
    if size != manifest["bytes"]:
        raise ValueError(f"it has {size} bytes, and its manifest says {manifest['bytes']}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise ValueError("its SHA-256 is not that of its manifest")
    return content


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint, on the CPU.

    Raises:
        OSError, ValueError: it is not what its manifest says, or holds more than tensors and plain values.
    """
    content = _verified_bytes(path)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that only claims to be a checkpoint makes of the reader
        raise ValueError(f"torch refuses it: {[*str(error).splitlines(), type(error).__name__][0]}") from error
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not the state of a run")
    return state


def _load_first(paths: Iterable[Path]) -> dict[str, Any] | None:
    for path in paths:
        try:
            return load(path)
        except (OSError, ValueError) as error:
            _log.warning("checkpoint %s is damaged and passed over: %s", path, error)
    return None


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint that verifies, on the CPU; None where there is none.

    Each one that does not verify is named in a warning and passed over.
    """
    return _load_first(available(folder))


def why_none(folder: Path, *, best: bool = False) -> str:
    """Say why `load_newest`, or `load_best`, has found nothing in a folder."""
    if not available(folder):
        return f"no checkpoint in {folder} yet; one comes every train.checkpoint_every epochs, and at the end"
    return f"no checkpoint in {folder} {'has a loss and verifies' if best else 'verifies'}"


def load_best(folder: Path) -> dict[str, Any] | None:
    """Read the checkpoint of lowest loss that verifies, on the CPU; None where there is none with a loss."""
    return _load_first(best_first(available(folder)))


def why_not(path: Path) -> str | None:
    """Say why a checkpoint would be passed over; None where it is what its manifest says."""
    try:
        _verified_bytes(path)
    except (OSError, ValueError) as error:
        return str(error)
    return None
