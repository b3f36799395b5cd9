"""The process group from the environment, and the few collectives that training uses."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from iic_dist.errors import UsageError
from iic_dist.wording import counted

T = TypeVar("T")

# torch 2.14 has renamed it, and warns of the old name in every run.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Place:
    """Where this process stands among the processes of a run; torchrun's environment, or a world of one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> Place:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, which torchrun sets."""
        names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
        if "RANK" not in os.environ:
            return cls()
        values = {field: int(os.environ[name]) for field, name in names.items()}
        return cls(**values, local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", values["world_size"])))

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def choose_device(name: str, place: Place) -> torch.device:
    """Resolve "auto", "cpu" or "cuda" to the device of this rank.

    Raises:
        UsageError: CUDA was asked for and is not there, or the machine has fewer GPUs than ranks.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"run.device={name!r}: must be auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("run.device='cuda': torch sees no CUDA device here; use --run.device cpu")
    count = torch.cuda.device_count()
    if place.local_world_size > count:
        raise UsageError(
            f"{place.local_world_size} ranks on a machine with {counted(count, 'GPU')}: start torchrun with "
            f"--nproc_per_node={count}, or use --run.device cpu"
        )
    return torch.device("cuda", place.local_rank)


def start(place: Place, device: torch.device, timeout_minutes: float) -> None:
    """Join the process group that torchrun's environment names; nothing in a world of one.

    NCCL carries CUDA tensors, gloo carries CPU tensors. Where the agent owns the store, it is prefixed with the
    restart count, because it outlives killed workers and their stale keys make a plain restart hang. A store of
    rank 0's own is new at each start, and must not be: agents count their restarts each by itself.
    """
    if "RANK" not in os.environ:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    agent_owns_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        place.world_size,
        is_master=place.rank == 0 and not agent_owns_store,
        timeout=timeout,
    )
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent_owns_store else "0"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"restart{restarts}", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )


def why_it_failed(error: RuntimeError) -> str | None:
    """Say in one line what a collective's error means and where to look; None for an error of another kind."""
    said = " ".join(str(error).split())
    if re.search(r"tim(ed|e) ?out", said, re.IGNORECASE):
        return (
            "a collective waited longer than run.timeout_minutes. Some rank hangs, was suspended, or lost its network: "
            f"look for the rank that says nothing here, at its machine and its log (torchrun --log-dir). [{said[:200]}]"
        )
    if re.search(r"connection (was )?(closed|reset|refused)|broken pipe|socket", said, re.IGNORECASE):
        return f"the connection to another rank broke: that one died first, see its error. [{said[:200]}]"
    return None


def use_threads(threads: int | None, place: Place) -> None:
    """Share the machine's cores among its ranks; torchrun by itself leaves one thread to each.

    Args:
        threads: Of this rank; None for its share of the cores.
        place: This rank.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // place.local_world_size))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks in `group`; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in `group`; 0 without a process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `tensor` over the ranks, in place, and return it.

    Collective: all ranks must call. Not visible to autograd: callers own their gradient.
    """
    if world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def gather_sizes(size: int, group: dist.ProcessGroup | None = None) -> list[int]:
    """Return every rank's `size`, in rank order.

    Collective: all ranks must call; gathers one integer a rank.
    Sync: on the host alone where the group carries CPU tensors, else waits for the device.
    """
    if world_size(group) == 1:
        return [size]
    device = "cpu" if "cpu:" in str(dist.get_backend_config(group)) else torch.cuda.current_device()
    sizes = torch.empty(world_size(group), dtype=torch.int64, device=device)
    _all_gather(sizes, torch.tensor([size], device=device), group=group)
    return [int(value) for value in sizes.tolist()]


def gather_rows(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Stack the rows of all ranks in rank order, without a gradient.

    Args:
        rows: (sizes[rank], ...), this rank's.
        sizes: the number of rows of each rank, as `gather_sizes` returns it.

    Collective: all ranks must call. Equal shards land in place; unequal ones are padded to the longest.
    """
    return start_gather_rows(rows, sizes, group)()


def start_gather_rows(
    rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None = None
) -> Callable[[], Tensor]:
    """Start `gather_rows` and return what gives its result; other work fits in between.

    Collective: all ranks must call. Sync: on CUDA none, the current stream waits for the result.
    """
    if world_size(group) == 1:
        return lambda: rows
    longest = max(sizes)
    padded = rows.contiguous()
    if rows.shape[0] < longest:
        padded = torch.cat([padded, padded.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
    gathered = padded.new_empty(len(sizes) * longest, *rows.shape[1:])
    work = _all_gather(gathered, padded, group=group, async_op=True)
    assert work is not None, "only a rank outside of the group has none"

    def finish() -> Tensor:
        work.wait()
        if min(sizes) == longest:
            return gathered
        return torch.cat([shard[:n] for shard, n in zip(gathered.split(longest), sizes, strict=True)])

    return finish


def gather_objects(value: T) -> list[T]:
    """Return every rank's `value`, in rank order.

    Collective: all ranks must call, each with something small that pickles. Sync: waits on the host.
    """
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast(value: T) -> T:
    """Return rank 0's `value` on every rank.

    Collective: all ranks must call. Sync: waits on the host.
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast_tensor(tensor: Tensor, source: int) -> Tensor:
    """Overwrite `tensor`, contiguous and on the CPU, with that of rank `source`, bit for bit, and return it.

    Collective: all ranks must call, with one shape and dtype.
    """
    if world_size() > 1:
        dist.broadcast(tensor.view(torch.uint8), src=source)
    return tensor


def wait_patiently() -> None:
    """Wait until all ranks are here, for a day if need be: longer than `run.timeout_minutes`.

    Collective: all ranks must call.
    """
    if world_size() > 1:
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        assert isinstance(patient, dist.ProcessGroup), "every rank is a member"
        dist.barrier(patient)


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def local_main_first(place: Place) -> Iterator[None]:
    """Let local rank 0 of each machine do its work before the others do theirs, however long it takes.

    Collective: all ranks must call. If local rank 0 fails, torchrun ends the others, which wait for a day.
    """
    if world_size() == 1:
        yield
        return
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    assert isinstance(patient, dist.ProcessGroup), "every rank is a member"
    if place.local_rank != 0:
        dist.barrier(patient)
    yield
    if place.local_rank == 0:
        dist.barrier(patient)
