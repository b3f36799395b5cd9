"""Checkpoints that somebody made in order to run code: none of it runs, though their digests are right."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iic_dist.training import checkpoint


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


class StateCall(Call):
    """Pickles as a harmless object whose state is the call of a function."""

    def __reduce__(self) -> Any:
        return dict, (), Call(self.function, *self.arguments)


def calls(mark: Path) -> dict[str, Any]:
    code = f"open({str(mark)!r}, 'w')"
    touch = ["touch", str(mark)]
    return {
        "system": Call(os.system, f"touch {mark}"),
        "popen": Call(os.popen, f"touch {mark}"),
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "open": Call(builtins.open, str(mark), "w"),
        "run": Call(subprocess.run, touch),
        "Popen": Call(subprocess.Popen, touch),
        "check_output": Call(subprocess.check_output, touch),
        "spawn": Call(os.spawnlp, os.P_WAIT, "touch", *touch),
        "mkdir": Call(os.mkdir, str(mark)),
    }


def as_zip(payload: object) -> bytes:
    """As torch.save writes it, with a pickle of our own."""
    buffer = io.BytesIO()
    torch.save({"step": 2}, buffer)
    source, made = zipfile.ZipFile(buffer), io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as target:
        for item in source.infolist():
            target.writestr(
                item, pickle.dumps(payload, protocol=2) if item.filename.endswith("data.pkl") else source.read(item)
            )
    return made.getvalue()


FORMS: dict[str, Callable[[Any], bytes]] = {
    "zip": lambda call: as_zip({"step": 2, "model": call}),
    "bare pickle": lambda call: pickle.dumps(
        {"step": 2, "model": StateCall(call.function, *call.arguments)}, protocol=2
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", calls(Path("mark")))
def test_a_pickle_that_calls_something_does_not(form: str, name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    checkpoint.save(tmp_path, 0, 1, {"step": 1})
    path = tmp_path / "epoch_00000_step_00000002.pt"
    content = FORMS[form](calls(mark)[name])
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    note = {"epoch": 0, "step": 2, "loss": -99.0, "bytes": len(content), "sha256": digest}
    path.with_suffix(".json").write_text(json.dumps(note))
    for load in (checkpoint.load_newest, checkpoint.load_best):
        loaded = load(tmp_path)
        assert loaded is None if load is checkpoint.load_best else loaded == {"step": 1}
    assert not mark.exists()


def test_these_pickles_would_do_harm(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    mark = tmp_path / "mark"
    for payload in (calls(mark)["open"], StateCall(builtins.open, str(mark), "w")):
        mark.unlink(missing_ok=True)
        program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
        subprocess.run([sys.executable, "-c", program], input=pickle.dumps(payload), check=False, capture_output=True)
        assert mark.exists()
