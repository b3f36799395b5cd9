"""The process group from the environment, and the few collectives that training uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

T = TypeVar("T")

FLIGHT_RECORDER = "flight_recorder_rank_"
"""Start of the names of what NCCL's flight recorder writes; the rank follows."""

# What torch reads when it makes a group, and when it makes the recorder: so many collectives are remembered.
_FLIGHT_RECORDER = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": "2000"}

_store: dist.Store | None = None
_patience = ""

# torch 2.14 has made it public, and warns of the old name.
_set_timeout: Callable[[timedelta], None] = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout

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


def start(place: Place, device: torch.device, timeout_minutes: float) -> None:
    """Join the process group that torchrun's environment names; nothing in a world of one.

    NCCL carries CUDA tensors, gloo carries CPU tensors. NCCL is told the device of the rank, so that it connects now
    and has none to guess, and its flight recorder is on. Where the agent owns the store, it is prefixed with the
    restart count, because it outlives killed workers and their stale keys make a plain restart hang. A store of
    rank 0's own is new at each start, and must not be: agents count their restarts each by itself.

    Args:
        place: This rank.
        device: Of this rank; with an index if it is a CUDA device.
        timeout_minutes: How long a collective waits, until `set_timeout` says otherwise.
    """
    global _store, _patience
    if "RANK" not in os.environ:
        return
    _patience = f"run.start_timeout_minutes ({timeout_minutes:g})"
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
        for name, value in _FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
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
    _store = dist.PrefixStore(f"restart{restarts}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=_store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        device_id=device if on_cuda else None,
    )


def set_timeout(minutes: float) -> None:
    """Let the collectives from here on wait so long, those of `wait_patiently` and `local_main_first` aside.

    Collective: all ranks must call; none goes on before all are here, or one that is early would not wait for one
    that is still at what takes long. Sync: waits on the host.
    """
    global _patience
    if world_size() > 1:
        barrier()
        _set_timeout(timedelta(minutes=minutes))
        _patience = f"run.timeout_minutes ({minutes:g})"


def record_flights_in(folder: Path) -> None:
    """Let NCCL's flight recorder write into a folder when a collective waits too long: a file a rank."""
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder.absolute() / FLIGHT_RECORDER))


def own_patience() -> str:
    """Name the setting that says how long collectives wait now, with its value; "" without a group by `start`."""
    return _patience


def own_store() -> dist.Store | None:
    """Return the store that this process has joined by, or None where it has joined none."""
    return _store


def stop() -> None:
    """Leave the process group, if there is one."""
    global _store
    _store = None
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
        barrier(_patient_group())


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait on the host until all ranks are here; a device goes on with what it has to do.

    Not torch's barrier: that one takes the device of the default group, which a group of gloo alone does not have.
    """
    if world_size(group) > 1:
        dist.all_reduce(torch.zeros(1), group=group)


def _patient_group() -> dist.ProcessGroup:
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    assert isinstance(patient, dist.ProcessGroup), "every rank is a member"
    return patient


@contextlib.contextmanager
def local_main_first(place: Place) -> Iterator[None]:
    """Let local rank 0 of each machine do its work before the others do theirs, however long it takes.

    Collective: all ranks must call. If local rank 0 fails, torchrun ends the others, which wait for a day.
    """
    if world_size() == 1:
        yield
        return
    patient = _patient_group()
    if place.local_rank != 0:
        barrier(patient)
    yield
    if place.local_rank == 0:
        barrier(patient)
