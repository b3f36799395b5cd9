"""Whose a run's folder is: one process that trains in it, and the launch that it belongs to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from iic_dist.errors import UsageError

LOCK = "owner.json"
"""Name of the file in the folder of a run that its process has locked; it says who that is, or was the last time."""

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who trains in a folder, or was the last to.

    Attributes:
        host: Name of its machine.
        pid: Of its process there.
        launches: What `launch` says on its ranks.
    """

    host: str
    pid: int
    launches: list[str]

    def is_of(self, launches: Iterable[str]) -> bool:
        """Whether it was started by one of these."""
        return not set(self.launches).isdisjoint(launches)


def launch() -> str | None:
    """Name what has started this rank: the same after a restart, another for every other job; None without torchrun.

    A number that torchrun draws (--standalone) is enough. Others are used again: "none" is the default. They get the
    agent beside them, torchrun's process of this machine, which outlives the ranks.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return None
    try:
        return str(uuid.UUID(run))
    except ValueError:
        return " ".join((run, platform.node(), _boot(), str(os.getppid()), _started(os.getppid())))


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return "-"


def _started(pid: int) -> str:
    """Return when a process was started, in clock ticks since the machine was: its number alone is given again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "-"


def last_owner(folder: Path) -> Owner | None:
    """Read who trains in a folder, or was the last to; None where nobody has said.

    Not while this process owns the folder: closing the file would give its lock away.
    """
    try:
        with (folder / LOCK).open("rb") as file:
            return _parsed(file.read())
    except OSError:
        return None


def _parsed(content: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):  # empty, or cut short
        return None


@contextlib.contextmanager
def owned(folder: Path, launches: list[str], patience: float) -> Iterator[None]:
    """Own a folder, which is made if it is not there; leave none behind in which nothing has been written.

    The lock is POSIX's (fcntl): it ends with the process however that ends, its children do not have it, and over NFS
    it holds between machines. Where a machine is lost, the server may keep it for a while.

    Args:
        folder: Of the run.
        launches: What `launch` says on all ranks.
        patience: Seconds to wait for a process of the same launch, which is on its way out.

    Raises:
        UsageError: another process owns it; in one line that says which.
        OSError: the folder cannot be written.
    """
    descriptor = _locked(folder, launches, patience)
    try:
        content = json.dumps(asdict(Owner(platform.node(), os.getpid(), launches))).encode() + b"\n"
        os.pwrite(descriptor, content, 0)  # first, because on a full disk it takes the room of the old one
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()  # still locked: who waits for it looks whether it is there
                folder.rmdir()
        os.close(descriptor)


def _locked(folder: Path, launches: list[str], patience: float) -> int:
    """Open and lock the file of a folder."""
    path, until = folder / LOCK, time.monotonic() + patience
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _log.warning(
                    "%s: this file system has no locks (%s): see to it that no other run has this name", folder, error
                )
                return descriptor
            holder = _parsed(os.pread(descriptor, 2**20, 0))
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if holder is None or not holder.is_of(launches) or time.monotonic() > until:
                raise UsageError(_refusal(folder, holder)) from None
            time.sleep(0.5)
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its last owner has just removed it


def _refusal(folder: Path, holder: Owner | None) -> str:
    who = "another process" if holder is None else f"process {holder.pid} on {holder.host}"
    line = f"{folder} is in use: {who} trains there; wait for its end, or choose another --run.name"
    if holder is not None and holder.host != platform.node():
        line += f" (if that machine is lost, delete {folder / LOCK})"
    return line
