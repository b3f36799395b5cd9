"""One run, one owner: what a launch is, and the lock that real processes hold and leave."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from iic_dist.errors import UsageError
from iic_dist.training import owner
from iic_dist.training.owner import LOCK, Owner, last_owner, owned

HOLD = """
import os, sys, time
from pathlib import Path
from iic_dist.training.owner import owned
with owned(Path(sys.argv[1]), sys.argv[2].split(), 0):
    (Path(sys.argv[1]) / "kept").touch()
    if os.fork() == 0:
        time.sleep(600)  # a process that decodes images, and stays behind
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns a folder for the launch "theirs", and has a child."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), "theirs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"{process.pid}\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_folder_has_one_owner_until_its_process_is_gone(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Two runs of one name wrote into one folder, and each removed the other's temporary files."""
    folder = tmp_path / "run"
    before = (folder / LOCK).read_bytes()
    with pytest.raises(UsageError) as refused, owned(folder, ["mine"], 100):
        pass
    assert str(refused.value) == (
        f"{folder} is in use: process {holder.pid} on {platform.node()} trains there; wait for its end, or choose "
        "another --run.name"
    )
    assert (folder / LOCK).read_bytes() == before
    holder.kill()
    holder.wait()  # its child lives on
    with owned(folder, ["mine"], 0):
        assert json.loads((folder / LOCK).read_bytes())["pid"] == os.getpid()


def test_a_restart_waits_for_the_process_that_it_takes_over_from(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """A lost machine's lock is kept by its server for a while, and the launch's next process must not be refused."""
    folder = tmp_path / "run"
    with pytest.raises(UsageError, match="is in use"), owned(folder, ["theirs"], 0):
        pass
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    started = time.monotonic()
    with owned(folder, ["mine", "theirs"], 60):
        assert 0.5 < time.monotonic() - started < 30
    killer.wait()
    assert last_owner(folder) == Owner(platform.node(), os.getpid(), ["mine", "theirs"])


def test_the_refusal_says_what_to_do_where_a_machine_was_lost(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    folder = tmp_path / "run"
    (folder / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7, "launches": []}))
    with pytest.raises(UsageError) as refused, owned(folder, [], 0):
        pass
    assert "process 7 on elsewhere trains there" in str(refused.value)
    assert str(refused.value).endswith(f"(if that machine is lost, delete {folder / LOCK})")
    (folder / LOCK).unlink()
    with owned(folder, [], 0):
        pass


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with owned(tmp_path / "run", [], 0):
        pass
    assert [line for line in caplog.messages if "this file system has no locks" in line]


def test_a_folder_in_which_nothing_was_written_is_not_left_behind(tmp_path: Path) -> None:
    with owned(tmp_path / "empty", [], 0):
        assert (tmp_path / "empty" / LOCK).exists()
    assert not (tmp_path / "empty").exists()
    with owned(tmp_path / "full", [], 0):
        (tmp_path / "full" / "config.yaml").touch()
    assert {path.name for path in (tmp_path / "full").iterdir()} == {LOCK, "config.yaml"}


def test_a_launch_is_the_same_after_a_restart_and_another_for_each_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's default number of a run is "none" for all of them."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert owner.launch() is None
    drawn = str(uuid.uuid4())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", drawn)
    assert owner.launch() == drawn
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    program = "from iic_dist.training.owner import launch; print(launch())"
    first, again = (subprocess.check_output([sys.executable, "-c", program], text=True) for _ in range(2))
    assert first == again
    assert first.strip() != owner.launch()  # another parent
    assert str(os.getpid()) in first.split()
