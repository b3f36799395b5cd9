"""Which rank and which collective: real ranks that hang, die, or do not do the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import Run

from iic_dist import failure
from iic_dist.distributed import Place
from iic_dist.training.examination import examine, what_next

ROOT = Path(__file__).parents[1]

PROGRAM = """
import os, signal, sys, time
import torch
from iic_dist import distributed
from iic_dist.config.console import errors_in_one_line
from iic_dist.distributed import Place
place, what = Place.from_environment(), sys.argv[1]
with errors_in_one_line(place):
    distributed.start(place, torch.device("cpu"), float(sys.argv[2]))
    distributed.barrier()
    if what == "shorten":
        distributed.set_timeout(0.05)
    if place.rank == place.world_size - 1:
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)
    else:
        distributed.all_reduce_sum(torch.zeros(3))
"""


def run_ranks(tmp_path: Path, ranks: int, what: str, minutes: float) -> tuple[list[str], float]:
    """Start the program on some ranks; return the lines that begin with "error: " and the seconds it took."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    port = str(free_port())
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), what, str(minutes)],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes[: ranks - 1]]
    seconds = time.monotonic() - started
    processes[-1].kill()
    processes[-1].communicate()
    assert "Traceback" not in "".join(said), said
    return [line for text in said for line in text.splitlines() if line.startswith("error: ")], seconds


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_rank_that_hangs_is_named_with_the_collective(tmp_path: Path) -> None:
    lines, _ = run_ranks(tmp_path, 3, "hang", 0.05)
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert f"rank {rank}: all_reduce_sum in " in line
        assert "waited longer than run.start_timeout_minutes (0.05)" in line
        assert "Nothing is heard of rank 2, which hangs" in line


def test_a_rank_that_dies_is_named_with_the_collective(tmp_path: Path) -> None:
    lines, seconds = run_ranks(tmp_path, 3, "die", 10)
    assert len(lines) == 2
    for line in lines:
        assert "the connection to another rank broke in all_reduce_sum" in line
        assert "Nothing is heard of rank 2, which died first" in line
    assert seconds < 100  # it does not wait for the timeout


def test_after_the_start_ranks_wait_less(tmp_path: Path) -> None:
    """From ten minutes to three seconds, by the one call."""
    lines, seconds = run_ranks(tmp_path, 2, "shorten", 10)
    [line] = lines
    assert "waited longer than run.timeout_minutes (0.05)" in line
    assert "Nothing is heard of rank 1" in line
    assert seconds < 100


def test_ranks_that_do_not_do_the_same_are_told_apart() -> None:
    store = dist.HashStore()
    store.set("failed/1", "broadcast in b.py:2")
    store.add("failed", 1)
    words = failure.exchange_words(store, Place(0, 2, 0, 2), "all_reduce_sum in a.py:1", 0.3)
    assert words == {1: "broadcast in b.py:2"}
    said = failure._who(words, "all_reduce_sum in a.py:1", Place(0, 2, 0, 2), "waited")
    assert "Rank 1 was in broadcast in b.py:2: the ranks do not do the same" in said
    said = failure._who({1: "x"}, "x", Place(0, 2, 0, 2), "waited")
    assert said.startswith("All ranks were there")


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    """It is that of a suspended rank 0: torch's client waits for it without end."""

    class Deaf(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            time.sleep(60)

    started = time.monotonic()
    assert failure.exchange_words(Deaf(), Place(1, 2, 1, 2), "x", 0.1) is None
    assert time.monotonic() - started < 20
    assert failure.exchange_words(None, Place(1, 2, 1, 2), "x", 0.1) is None
    assert "begin with rank 0's machine" in failure._who(None, "x", Place(1, 2, 1, 2), "waited")


@pytest.mark.parametrize("said", ["CUDA out of memory", "mat1 and mat2 shapes cannot be multiplied"])
def test_another_error_is_not_explained(said: str) -> None:
    assert failure.why_it_failed(RuntimeError(said), Place()) is None


def test_a_suspended_rank_of_a_training_is_named_within_the_short_timeout(tmp_path: Path) -> None:
    """The start may wait for an hour, as by default; the timeout of the steps is six seconds."""
    with Run(tmp_path, "--train.epochs", "500", "--run.timeout_minutes", "0.1") as run:
        run.wait_for(2)
        os.kill(run.workers()[1], signal.SIGSTOP)
        started = time.monotonic()
        while "error: rank 0: " not in run.output:
            assert time.monotonic() - started < 60, run.output
            time.sleep(0.1)
        [line] = [line for line in run.output.splitlines() if line.startswith("error: rank 0: ")]
        assert "waited longer than run.timeout_minutes (0.1). Nothing is heard of rank 1, which hangs" in line
        assert ".py:" in line
        found = examine(run.folder)  # torchrun itself ends the suspended one half a minute later
        assert what_next(found)[0].endswith(f"rank 1: kill -CONT {found.ranks[1].pid}")
        assert not found.is_well
