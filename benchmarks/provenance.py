"""Where a figure comes from: the commit, the extension, the device and the versions."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def output_of(*command: str) -> str | None:
    """What a command prints on one line; None where it is not there or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip().split("\n")[-1] or None if run.returncode == 0 else None


def commit() -> str | None:
    """The commit that runs; a tree without git, or inside another one's, has it from the variable COMMIT."""
    return os.environ.get("COMMIT") or output_of("git", "rev-parse", "HEAD")


def extension() -> dict[str, Any] | str:
    """What the extension was built for, or why there is none."""
    try:
        info: dict[str, Any] = importlib.import_module("iic_dist._C").build_info()
    except (ImportError, OSError) as error:
        return str(error)
    return info


def _device(device: str) -> dict[str, Any]:
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        return {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": output_of("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader"),
            "nvcc": output_of("nvcc", "--version"),
        }
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"device": names[0].split(": ")[1] if names else platform.machine()}


def of(device: str) -> dict[str, Any]:
    """What belongs to every figure: the device, the commit and the versions."""
    return {
        **_device(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "extension": extension(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
