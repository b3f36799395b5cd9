"""Which device a rank takes; CUDA and MPS are played by torch.accelerator, for neither is here."""

from __future__ import annotations

import pytest
import torch

from iic_dist.device import choose_device
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.ops import augment, iic, nt_xent


def play(monkeypatch: pytest.MonkeyPatch, device: str | None, count: int = 1) -> None:
    """Let torch see an accelerator of this type, or none."""
    found = None if device is None else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_auto_takes_cuda_else_mps_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "cuda", 2)
    assert choose_device("auto", Place(3, 4, 1, 2)) == torch.device("cuda", 1)
    play(monkeypatch, "mps")
    assert choose_device("auto", Place()) == choose_device("mps", Place()) == torch.device("mps", 0)
    play(monkeypatch, None)
    assert choose_device("auto", Place()) == torch.device("cpu")


def test_auto_leaves_alone_what_was_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "xpu")
    assert choose_device("auto", Place()) == torch.device("cpu")


def test_several_ranks_on_a_mac_compute_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo does not carry what lies on MPS."""
    play(monkeypatch, "mps")
    assert choose_device("auto", Place(0, 2, 0, 2)) == torch.device("cpu")
    with pytest.raises(UsageError, match="'mps': 2 ranks cannot share it"):
        choose_device("mps", Place(0, 2, 0, 2))


@pytest.mark.parametrize("there", [None, "mps"])
def test_what_is_not_there_is_one_line(there: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, there)
    with pytest.raises(UsageError, match="'cuda'.*no CUDA device here; use --run.device cpu"):
        choose_device("cuda", Place())
    with pytest.raises(UsageError, match="'tpu': must be auto, cpu, cuda or mps"):
        choose_device("tpu", Place())


def test_more_ranks_than_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "cuda", 2)
    with pytest.raises(UsageError, match="4 ranks on a machine with 2 GPU.*nproc_per_node=2"):
        choose_device("auto", Place(0, 4, 0, 4))
    assert choose_device("cpu", Place(0, 4, 0, 4)) == torch.device("cpu")


def test_the_machine_at_hand_is_asked_what_it_has() -> None:
    """Not played: torch is built for CUDA here, whether there is a GPU or not."""
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto", Place()).type == expected


def test_ops_have_no_kernels_for_mps_and_take_the_pytorch_form() -> None:
    mps = torch.device("mps", 0)
    assert iic.implementation("auto", mps) is iic.TORCH
    assert nt_xent.implementation("auto", mps) is nt_xent.TORCH
    assert not augment.supported("auto", mps, torch.float32)
    with pytest.raises(RuntimeError, match="'fused'"):
        iic.implementation("fused", mps)
