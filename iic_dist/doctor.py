"""Look at this machine: `python -m iic_dist.doctor` says what training would run on; it exits with 0 where it works.

Or at a run: `python -m iic_dist.doctor --run runs/NAME` says how it went and what to do next.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from iic_dist import __version__
from iic_dist.losses import iic_loss, nt_xent_loss
from iic_dist.ops import augment, backend, iic, nt_xent


def _devices() -> str:
    if not torch.cuda.is_available():
        return f"none visible; CPU with {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    return os.path.realpath(found) if found else "not found"


def _extension() -> str:
    if backend.WHY_NOT_FUSED is not None:
        return f"not used: {backend.WHY_NOT_FUSED}"
    extension = importlib.import_module("iic_dist._C")
    info = extension.build_info()
    cuda = f"CUDA {info['cuda']}" if info["cuda"] else "no CUDA"
    return f"{extension.__file__}, for torch {info['torch']}, {cuda}, {info['cpu_capability']} here"


def _backends() -> str:
    there = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()} if dist.is_available() else {}
    return ", ".join(name for name, available in there.items() if available) or "none: one process only"


def facts() -> dict[str, str]:
    """List what a report of a problem should hold."""
    return {
        "iic_dist": __version__,
        "python": f"{platform.python_version()} on {platform.machine()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'no'}",
        "GPUs": _devices(),
        "nvcc": _nvcc(),
        "extension": _extension(),
        "collectives": _backends(),
    }


def _error(value: Tensor, expected: float) -> float:
    return abs(float(value.detach()) - expected)


def checks(device: torch.device) -> dict[str, float]:
    """Compare the losses that training would take with values known by hand.

    Returns:
        The absolute error of each, in nats; all belong below 1e-4.
    """
    k = 10
    one_hot = (1e4 * torch.eye(k, device=device)).unsqueeze(1).requires_grad_()
    certain = iic_loss(one_hot, one_hot.detach()).loss.sum()
    first = 1e4 * torch.eye(k, device=device).repeat_interleave(k, 0).unsqueeze(1)
    second = 1e4 * torch.eye(k, device=device).repeat(k, 1).unsqueeze(1)
    same = torch.ones(8, 4, device=device, requires_grad=True)
    collapsed = nt_xent_loss(same, same)
    (certain + collapsed).backward()
    assert one_hot.grad is not None
    assert same.grad is not None
    return {
        "IIC of agreeing one-hot views = -ln K": _error(certain, -math.log(k)),
        "IIC of independent views = 0": _error(iic_loss(first, second).loss.sum(), 0.0),
        "NT-Xent of equal embeddings = ln(2G - 1)": _error(collapsed, math.log(15)),
        "gradients at these extremes = 0": float(one_hot.grad.abs().sum() + same.grad.abs().sum()),
    }


def _report(line: Callable[[str], None]) -> bool:
    for name, value in facts().items():
        line(f"{name:12} {value}")
    good = True
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        where = torch.device(device)
        compiled = {
            "IIC": iic.implementation("auto", where) is iic.FUSED,
            "NT-Xent": nt_xent.implementation("auto", where) is nt_xent.FUSED,
            "views": augment.supported("auto", where, torch.float32),
        }
        ops = ", ".join(f"{op} {'fused' if fused else 'in PyTorch'}" for op, fused in compiled.items())
        line(f"{device + ' ops':12} {ops}")
        for name, error in checks(where).items():
            passed = error < 1e-4
            good &= passed
            line(f"{'ok' if passed else 'WRONG':12} {device}: {name} (error {error:.1e})")
    return good


def _report_of_a_run(run: Path) -> bool:
    # Here, for a bare machine with torch alone can be looked at without what these need.
    from iic_dist.config.console import errors_in_one_line, log_to_console, say
    from iic_dist.distributed import Place
    from iic_dist.training import examination

    log_to_console()
    with errors_in_one_line(Place()):
        found = examination.examine(run)
    say(Place(), *examination.report(found))
    return found.is_well


def main() -> None:
    """Print the report; exit with 1 where a loss is wrong, or where a run has failed or is damaged."""
    parser = argparse.ArgumentParser(
        prog="python -m iic_dist.doctor",
        description="Say what this machine has, which ops are compiled, and whether the losses are right here. "
        "Exits with 0 where training would work. Or, with --run, say how far a run came, why it ended, which of its "
        "checkpoints verify, and what to do next; exits with 1 where it failed or something is damaged.",
    )
    parser.add_argument("--run", "--folder", type=Path, metavar="DIR", help="folder of a run, runs/NAME, to look at")
    run = parser.parse_args().run
    if run is not None:
        sys.exit(0 if _report_of_a_run(run) else 1)
    if not _report(print):
        sys.exit("the losses are wrong on this machine: build the extension again, or use --loss.impl torch")
    print("training would work")


if __name__ == "__main__":
    main()
