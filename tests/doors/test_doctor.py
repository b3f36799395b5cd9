from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from iic_dist import doctor


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor"])


def test_the_report_names_what_training_needs(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main()
    said = capsys.readouterr().out
    assert torch.__version__ in said
    for name in ("GPUs", "nvcc", "extension", "gloo", "IIC of agreeing one-hot views", "training would work"):
        assert name in said
    assert "WRONG" not in said


def test_a_wrong_loss_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = doctor.iic_loss
    monkeypatch.setattr(doctor, "iic_loss", lambda a, b: right(a, b.flip(0), entropy_weight=1.01))
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code not in (0, None)
    assert "WRONG" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: not a run, there is no {tmp_path}/config.yaml\n"
