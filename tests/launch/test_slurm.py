"""launch/slurm.sbatch on a real Slurm: stopped near its time limit, preempted, on two nodes, and where it fails."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched import LAUNCH, SMALL, STEPS, assert_same_weights, environment, steps_done, wait_until
from slurm_cluster import Slurm, free_ports, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

LOST = STEPS // 3
"""A step at which a job is stopped, or a later one."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


class Job:
    """A job of launch/slurm.sbatch in a folder that holds nothing but launch/, as in a checkout."""

    def __init__(
        self, slurm: Slurm, cwd: Path, *options: str, nodes: int = 1, ranks: int = 2, trainer: list[str]
    ) -> None:
        self.slurm, self.cwd = slurm, cwd
        (cwd / "launch").symlink_to(LAUNCH)
        variables = environment(RANKS=str(ranks), HEAD=f"127.0.0.1:{free_ports(1)[0]}", SLURM_CONF=slurm.configuration)
        command = ["sbatch", "--parsable", f"--nodes={nodes}", *options, "launch/slurm.sbatch", *trainer]
        said = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, said.stderr
        self.number = said.stdout.strip()
        self.folder = cwd / "runs" / f"iic-{self.number}"

    def state(self) -> str:
        return self.slurm.field(self.number, "JobState")

    def restarts(self) -> str:
        return self.slurm.field(self.number, "Restarts")

    def said(self) -> str:
        log = self.cwd / f"iic-{self.number}.out"
        return log.read_text()[-8000:] if log.exists() else "nothing"

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: steps_done(self.folder) >= step)

    def wait_for(self, *states: str) -> None:
        self.wait(lambda: self.state() in states)

    def wait(self, condition: Callable[[], bool]) -> None:
        wait_until(condition, 240, lambda: f"job is {self.state()}; {self.said()}; {self.slurm.logs()}")

    def assert_finished(self, undisturbed: Path) -> None:
        self.wait_for("COMPLETED", "FAILED", "CANCELLED")
        assert self.state() == "COMPLETED", self.said()
        assert self.restarts() == "1"
        assert (self.folder / "result.json").exists()
        assert not (self.folder / "PREEMPTED").exists()
        assert_same_weights(self.folder, undisturbed)


@pytest.mark.slow
def test_near_its_time_limit_a_job_is_saved_and_queued_again(slurm: Slurm, tmp_path: Path, undisturbed: Path) -> None:
    job = Job(slurm, tmp_path, trainer=SMALL)
    job.wait_for_step(LOST)
    slurm.command("scancel", "--batch", "--signal=USR1", job.number)  # as --signal=B:USR1@120 does
    job.assert_finished(undisturbed)
    assert f"runs/iic-{job.number}: stopped and saved; queued again" in job.said()


@pytest.mark.slow
def test_the_time_limit_itself_is_met_with_a_saved_run(slurm: Slurm, tmp_path: Path) -> None:
    endless = [*SMALL, "--train.epochs", "100000", "--train.checkpoint_every", "100000"]
    job = Job(slurm, tmp_path, "--time=3", trainer=endless)  # minutes; --signal=B:USR1@120 comes within the second
    job.wait(lambda: "queued again" in job.said())
    assert (job.folder / "PREEMPTED").exists()
    assert list((job.folder / "checkpoints").glob("*.pt"))
    job.wait(lambda: job.restarts() == "1")
    slurm.command("scancel", job.number)


@pytest.mark.slow
def test_a_preempted_job_on_two_nodes_goes_on(slurm: Slurm, tmp_path: Path, undisturbed: Path) -> None:
    job = Job(slurm, tmp_path, nodes=2, ranks=1, trainer=SMALL)
    job.wait_for_step(LOST)
    slurm.command("scontrol", "requeue", job.number)  # as preemption with PreemptMode=REQUEUE does
    job.wait(lambda: "Slurm has taken the job back" in job.said())
    job.assert_finished(undisturbed)


@pytest.mark.slow
def test_a_cancelled_job_stays_so(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, trainer=SMALL)
    job.wait_for_step(LOST)
    slurm.command("scancel", job.number)
    job.wait_for("CANCELLED")
    job.wait(lambda: (job.folder / "PREEMPTED").exists())
    assert json.loads((job.folder / "PREEMPTED").read_text())["step"] >= LOST
    assert job.restarts() == "0"


def test_a_job_that_fails_is_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--export=ALL,RESTARTS=0", ranks=1, trainer=["--optim.lr", "-1"])
    job.wait_for("FAILED", "COMPLETED")
    assert job.state() == "FAILED"
    assert job.restarts() == "0"
    assert "error: optim.lr=-1.0: must be above 0" in job.said()
