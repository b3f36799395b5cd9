"""Checkpoints that are either whole or not there, and are verified before they are read."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger(__name__)

KEEP = 3
_NAME = re.compile(r"step_(\d{8})\.pt")


def _write(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one, the new one or none; never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` and keep the newest `KEEP`.

    A manifest with the SHA-256 stands beside each checkpoint, because `torch.load` does not notice flipped bits.

    Args:
        folder: Made if it is not there.
        step: Steps done; the name of the file.
        state: Tensors, numbers, strings, lists and dicts, which `torch.load(weights_only=True)` reads back.

    Raises:
        OSError: the disk is full or the folder cannot be written; older checkpoints are intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    path = folder / f"step_{step:08d}.pt"
    manifest = {"step": step, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write(path, content)
    _write(path.with_suffix(".json"), json.dumps(manifest).encode())
    _sync_folder(folder)
    for old in available(folder)[KEEP:]:
        old.with_suffix(".json").unlink(missing_ok=True)
        old.unlink()
    return path


def available(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, newest first, without looking inside."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _verified_bytes(path: Path) -> bytes:
    """Read a checkpoint that is what its manifest says, or raise ValueError or OSError."""
    manifest = json.loads(path.with_suffix(".json").read_text())
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise ValueError("its SHA-256 is not that of its manifest")
    return content


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint that verifies, on the CPU; None where there is none.

    Each one that does not verify is named in a warning and passed over.
    """
    for path in available(folder):
        try:
            content = _verified_bytes(path)
        except (OSError, ValueError, KeyError) as error:
            _log.warning("checkpoint %s is damaged and passed over: %s", path, error)
            continue
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return state
    return None
