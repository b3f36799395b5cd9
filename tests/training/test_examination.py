"""What is said of runs that ended in many ways: trained for real, and then changed as a fault would leave them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_tasks
import torch._C._distributed_c10d as c10d
from ranks import Ranks
from runs import Run

from iic_dist.distributed import FLIGHT_RECORDER, Place
from iic_dist.errors import RunError, UsageError
from iic_dist.training.examination import examine, report
from iic_dist.training.flight_recorder import read_dumps
from iic_dist.training.rank_record import FOLDER, RankLog, RankRecord, read_records


def said(run: Path) -> str:
    """The report of a run; the last line is what to do."""
    return "\n".join(report(examine(run)))


@pytest.fixture
def run(gray_run: Path, tmp_path: Path) -> Path:
    """A copy of a small run that has ended."""
    return Path(shutil.copytree(gray_run, tmp_path / "runs" / "r"))


def change(run: Path, rank: int, **values: object) -> None:
    """Leave a record of a rank, made from that of rank 0."""
    record = json.loads((run / FOLDER / "rank_00000.json").read_text())
    (run / FOLDER / f"rank_{rank:05d}.json").write_text(json.dumps({**record, "rank": rank, **values}))


def test_a_run_that_has_ended_is_to_be_used(run: Path) -> None:
    found = examine(run)
    assert found.is_well
    [record] = found.ranks
    assert (record.rank, record.world_size, record.state, record.pid) == (0, 1, "ended", os.getpid())
    assert record.step == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    text = said(run)
    assert "the end was reached" in text
    assert re.search(r"rank 0 +step \d+, ended", text)
    assert text.splitlines()[-1].startswith("next         nothing: use it, python -m iic_dist.predict")


def test_damaged_checkpoints_are_named_and_the_newest_good_one_is_gone_on_from(run: Path) -> None:
    (run / "result.json").unlink()
    good = examine(run).good
    damaged = good[0].with_name("epoch_00099_step_00000999.pt")
    damaged.write_bytes(good[0].read_bytes()[:100])
    shutil.copy(good[0].with_suffix(".json"), damaged.with_suffix(".json"))
    found = examine(run)
    assert found.good == good
    assert list(found.damaged) == [damaged]
    assert not found.is_well
    text = said(run)
    assert f"DAMAGED      {damaged.name}: its manifest is that of epoch" in text
    step = int(good[0].stem[-8:])
    assert text.splitlines()[-1] == (
        f"next         go on from step {step}: python -m iic_dist.train --config {run}/config.yaml"
    )
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert "next         begin again, for no checkpoint verifies: python" in said(run)


def test_ranks_of_before_do_not_count(run: Path) -> None:
    """A run that is gone on with on fewer ranks leaves the files of the others."""
    change(run, 0, world_size=2, begun=time.time())
    change(run, 1, world_size=2)
    change(run, 5, world_size=8)
    (run / FOLDER / "rank_00007.json").write_text("{")
    assert [record.rank for record in read_records(run)] == [0, 1]


def test_the_rank_that_failed_of_itself_is_the_one_to_mend(run: Path) -> None:
    (run / "result.json").unlink()
    broken = "RuntimeError in f (a.py:1): Connection closed by peer"
    change(run, 0, world_size=2, state="failed", why=broken)
    change(run, 1, world_size=2, state="failed", why="OutOfMemoryError in g (b.py:2): CUDA out of memory")
    text = said(run)
    assert "next         mend what rank 1 failed of: OutOfMemoryError in g (b.py:2): CUDA out of memory" in text
    assert "what rank 0 failed of" not in text
    assert text.splitlines()[-1].startswith("next         go on from step ")
    assert "torchrun --nproc_per_node=2 -m iic_dist.train" in text
    change(run, 1, world_size=2, host="elsewhere", state="failed", why=broken)
    assert said(run).splitlines()[-1].endswith(": as it was started")


def test_a_run_that_runs_is_left_alone(run: Path) -> None:
    change(run, 0, state="training", time=time.time())
    assert "nothing: it runs, and has done" in said(run).splitlines()[-1]
    change(run, 0, state="training", time=time.time() - 300)
    assert "wait, or look: no step for 5 minutes" in said(run).splitlines()[-1]
    change(run, 0, state="training", time=time.time(), host="elsewhere")
    assert "nothing: it runs" in said(run).splitlines()[-1]
    change(run, 0, state="training", time=time.time() - 300, host="elsewhere")
    assert "it runs" not in said(run)


def test_another_process_of_the_same_number_is_not_the_rank(run: Path) -> None:
    change(run, 0, state="training", process_started=1)
    [record] = examine(run).ranks
    assert record.is_there() == "is gone"


def test_an_error_is_noted_in_one_short_line(tmp_path: Path) -> None:
    error = RunError('a "quote" and more 🏖️\n' + "x" * 5000)
    with contextlib.suppress(RunError), RankLog(tmp_path, Place(3, 4, 1, 2)) as log:
        log.at(7, "refine")
        raise error
    [record] = read_records(tmp_path)
    assert (record.rank, record.step, record.stage, record.state) == (3, 7, "refine", "failed")
    assert record.why.startswith('RunError in code that is not ours: a "quote" and more ?')
    assert (record.host, record.pid) == (platform.node(), os.getpid())
    assert (tmp_path / FOLDER / "rank_00003.json").stat().st_size == 1024


def test_a_record_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    with RankLog(tmp_path, Place()) as log:
        for step in range(3):
            log.at(step, "representation")
    assert [record.getMessage()[:37] for record in caplog.records] == ["no record of where rank 0 is: [Errno "]


def test_a_step_costs_little(tmp_path: Path) -> None:
    """Measured 20 microseconds; the bound is for a busy machine."""
    with RankLog(tmp_path, Place()) as log:
        started = time.perf_counter()
        for step in range(1000):
            log.at(step, "representation")
        assert time.perf_counter() - started < 1.0
    assert read_records(tmp_path)[0].step == 999


@pytest.mark.skipif(
    not hasattr(c10d, "FlightRecorderHook"), reason="torch before 2.14 records NCCL's collectives alone"
)
def test_the_flight_recorder_says_who_waits_in_what(run: Path, pair: Ranks) -> None:
    """torch's recorder, attached to gloo, for there is no NCCL here: rank 0 waits, rank 1 has not come yet."""
    for rank, dump in enumerate(pair.run(2, rank_tasks.flight_recorder_of_a_wait)):
        (run / FOLDER / f"{FLIGHT_RECORDER}{rank}").write_bytes(dump)
    waiting, refused = read_dumps(run)
    assert refused == []
    assert [each.rank for each in waiting] == [0, 1]
    assert waiting[0].collective is not None
    assert re.fullmatch(r"\w+:all_?reduce number \d+ of 3 x 4 numbers", waiting[0].collective)
    assert waiting[1].collective is None
    assert waiting[0].number == waiting[1].number + 1
    change(run, 0, world_size=2)
    change(run, 1, world_size=2)
    (run / "result.json").unlink()
    text = said(run)
    assert "NCCL, rank 0 waited in " in text
    assert "next         rank 1 came to fewer collectives than the others: that one kept them waiting" in text
    (run / FOLDER / f"{FLIGHT_RECORDER}1").unlink()
    assert "next         rank 1 left no flight recorder's file: begin there" in said(run)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, ("touch /tmp/should-not-be-there",)


def test_a_flight_recorders_file_that_would_run_code_is_refused(run: Path) -> None:
    path = run / FOLDER / f"{FLIGHT_RECORDER}0"
    path.write_bytes(pickle.dumps({"entries": [Malicious()]}))
    found = examine(run)
    [line] = found.complaints
    assert "it wants posix.system" in line
    assert not found.is_well
    for content in (b"", b"\x80", pickle.dumps([1]), pickle.dumps({"entries": [{}]})):
        path.write_bytes(content)
        assert len(examine(run).complaints) == 1


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run"):
        examine(tmp_path)


def doctor(run: Run) -> tuple[int, str]:
    command = [sys.executable, "-m", "iic_dist.doctor", "--run", str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_doctor_of_killed_and_stopped_runs_gives_a_command_that_goes_on(tmp_path: Path) -> None:
    """Real ranks: one is killed; what is said to go on with does, and is stopped; that goes on to the end."""
    with Run(tmp_path, "--train.epochs", "2", "--train.checkpoint_every_steps", "3") as run:
        run.wait_for(4)
        os.kill(run.workers()[1], signal.SIGKILL)
        assert run.end() == 1
    code, text = doctor(run)
    assert code == 1, text
    assert re.search(r"rank 0 +step \d+, failed.*Connection", text), text
    assert re.search(r"rank 1 +step \d+, training.* is gone", text), text
    assert "ended without a word: look for 'Out of memory" in text
    last = text.splitlines()[-1]
    assert re.match(r"next +go on from step [3-9]", last), text
    command = last.rpartition(": ")[2].replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
    done = subprocess.run(shlex.split(command), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stdout
    code, text = doctor(run)
    assert code == 0, text
    assert re.search(r"rank 1 +step 14, ended", text), text
    with Run(tmp_path, "--train.epochs", "50", "--train.checkpoint_every_steps", "3") as run:
        run.wait_for(16)
        os.kill(run.workers()[0], signal.SIGTERM)
        assert run.end() == 0, run.output
    code, text = doctor(run)
    assert code == 0, text
    assert re.search(r"PREEMPTED +SIGTERM came: saved after step \d+", text), text
    assert re.search(r"rank 0 +step \d+, stopped", text), text
    assert re.match(r"next +go on from step \d+: torchrun", text.splitlines()[-1]), text


def test_every_field_of_a_record_is_checked(tmp_path: Path) -> None:
    with RankLog(tmp_path, Place()):
        pass
    path = tmp_path / FOLDER / "rank_00000.json"
    good = json.loads(path.read_text())
    assert set(good) == {field.name for field in dataclasses.fields(RankRecord)}
    for name in good:
        path.write_text(json.dumps({**good, name: None}))
        assert read_records(tmp_path) == []
