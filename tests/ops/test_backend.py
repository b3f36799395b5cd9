"""Which implementation runs where the extension is missing, broken or built for something else."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from iic_dist.ops import backend


def fresh_backend(monkeypatch: pytest.MonkeyPatch, extension: object) -> ModuleType:
    """ops/backend.py as a process would load it that finds `extension` in place of iic_dist._C."""
    monkeypatch.setitem(sys.modules, "iic_dist._C", extension)
    spec = importlib.util.spec_from_file_location("fresh_backend", str(backend.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BROKEN = {
    "missing": (None, "could not be loaded"),
    "built for another torch": (
        SimpleNamespace(build_info=lambda: {"torch": "2.0.1", "cuda": None}),
        "torch 2.0.1",
    ),
}


@pytest.mark.parametrize(("extension", "why"), BROKEN.values(), ids=BROKEN)
def test_without_the_extension_it_says_so_once(
    extension: object, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        module = fresh_backend(monkeypatch, extension)
        assert [module.choose("auto") for _ in range(3)] == ["torch"] * 3
    assert [why in message for message in caplog.messages] == [True]
    with pytest.raises(RuntimeError, match=why):
        module.choose("fused")


def test_the_other_ranks_of_a_machine_leave_the_warning_to_the_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with caplog.at_level(logging.WARNING):
        assert fresh_backend(monkeypatch, None).WHY_NOT_FUSED is not None
    assert not caplog.messages


def test_a_broken_extension_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    program = (
        "import sys, iic_dist; iic_dist.__path__.insert(0, sys.argv[1])\n"
        "from iic_dist.ops import backend; print(backend.WHY_NOT_FUSED); print(backend.choose('auto'))"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "could not be loaded" in run.stdout
    assert run.stdout.split()[-1] == "torch"


def test_a_device_that_the_extension_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"torch": torch.__version__.split("+")[0], "cuda": None}
    module = fresh_backend(monkeypatch, SimpleNamespace(build_info=lambda: info))
    assert (module.choose("auto", "cpu"), module.choose("auto", "cuda")) == ("fused", "torch")
    with pytest.raises(RuntimeError, match="built for cpu, not cuda"):
        module.choose("fused", "cuda")
