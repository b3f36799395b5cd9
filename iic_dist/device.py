"""Where a rank computes: CUDA, else the GPU of a Mac (MPS), else the CPU."""

from __future__ import annotations

import os

import torch

from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.wording import counted

NAMES = ("auto", "cpu", "cuda", "mps")


def choose_device(name: str, place: Place) -> torch.device:
    """Resolve one of `NAMES` to the device of this rank.

    "auto" is CUDA where torch sees a GPU, else MPS where it sees one and the rank is alone, else the CPU: nothing
    carries tensors from one Mac's GPU to another. Other accelerators that torch knows are not taken, they were
    never tried.

    Raises:
        UsageError: what was asked for is not there, or there is less of it than ranks on this machine.
    """
    if name not in NAMES:
        raise UsageError(f"run.device={name!r}: must be {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    found = torch.accelerator.current_accelerator(check_available=True)
    there = "cpu" if found is None else found.type
    if name == "auto":
        name = there if there == "cuda" or (there == "mps" and place.world_size == 1) else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != there:
        raise UsageError(f"run.device={name!r}: torch sees no {name.upper()} device here; use --run.device cpu")
    if name == "mps":
        if place.world_size > 1:
            raise UsageError(f"run.device='mps': {place.world_size} ranks cannot share it; start one, without torchrun")
        return torch.device("mps", 0)
    count = torch.accelerator.device_count()
    if place.local_world_size > count:
        raise UsageError(
            f"{place.local_world_size} ranks on a machine with {counted(count, 'GPU')}: start torchrun with "
            f"--nproc_per_node={count}, or use --run.device cpu"
        )
    return torch.device("cuda", place.local_rank)


def exact_device(device: torch.device) -> torch.device:
    """Return where to compute what is the same everywhere, as views and neighbours are, for a network on `device`.

    Their numbers are float64 and 64-bit integers. MPS has no float64, so there the CPU beside it makes them.
    """
    return torch.device("cpu") if device.type == "mps" else device


def use_threads(threads: int | None, place: Place) -> None:
    """Share the machine's cores among its ranks; torchrun by itself leaves one thread to each.

    Args:
        threads: Of this rank; None for its share of the cores.
        place: This rank.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // place.local_world_size))
