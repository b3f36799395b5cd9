"""launch/multinode.sh: agents meet over loopback and between network namespaces; a lost one comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from launched import (
    LAUNCH,
    SMALL,
    STEPS,
    assert_same_weights,
    descendants,
    end,
    kill,
    output,
    start,
    steps_done,
    wait_until,
)
from slurm_cluster import free_ports


def agent(number: int, head: str, cwd: Path, *before: str, **variables: str) -> subprocess.Popen[str]:
    """Start the agent of one of two machines; `before` is a command that runs it elsewhere."""
    command = [*before, LAUNCH / "multinode.sh", *SMALL, "--run.name", "two"]
    return start(*command, cwd=cwd, HEAD=head, NODES="2", NODE_RANK=str(number), RANKS="1", **variables)


def finish(agents: list[subprocess.Popen[str]], cwd: Path) -> None:
    for each in agents:
        assert each.wait(timeout=300) == 0, output(cwd)


@pytest.mark.slow
def test_two_agents_are_one_and_one_may_be_lost_and_come_back(tmp_path: Path, undisturbed: Path) -> None:
    head, folder = f"127.0.0.1:{free_ports(1)[0]}", tmp_path / "runs" / "two"
    with ExitStack() as stack:
        agents = [agent(number, head, tmp_path) for number in (0, 1)]
        for each in agents:
            stack.callback(end, each)
        wait_until(lambda: steps_done(folder) > STEPS // 3, 200, lambda: output(tmp_path))
        kill([agents[1].pid, *descendants(agents[1].pid)])
        agents[1].wait()
        agents[1] = agent(1, head, tmp_path)
        stack.callback(end, agents[1])
        finish(agents, tmp_path)
    assert "going on after epoch" in output(tmp_path)
    assert_same_weights(folder, undisturbed)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them, 10.199.0.1 and 10.199.0.2."""
    if os.geteuid() != 0:
        pytest.skip("needs root, who may make network namespaces")
    if shutil.which("ip") is None:
        pytest.skip("needs ip: apt-get install iproute2")
    names = (f"iic{os.getpid()}a", f"iic{os.getpid()}b")
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make network namespaces")
    try:
        subprocess.run(["ip", "netns", "add", names[1]], check=True)
        cable = ["ip", "link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "veth0", "netns", names[1]]
        subprocess.run(cable, check=True)
        for number, name in enumerate(names, 1):
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "address", "add", f"10.199.0.{number}/24", "dev", "veth0"], check=True)
            for device in ("lo", "veth0"):
                subprocess.run([*inside, "link", "set", device, "up"], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
def test_two_machines_are_one(tmp_path: Path, undisturbed: Path, namespaces: tuple[str, str]) -> None:
    with ExitStack() as stack:
        agents = []
        for number, name in enumerate(namespaces):
            network = {"ADDRESS": f"10.199.0.{number + 1}", "GLOO_SOCKET_IFNAME": "veth0"}
            agents.append(agent(number, "10.199.0.1:29400", tmp_path, "ip", "netns", "exec", name, **network))
            stack.callback(end, agents[-1])
        finish(agents, tmp_path)
    assert_same_weights(tmp_path / "runs" / "two", undisturbed)


@pytest.mark.parametrize(
    ("variables", "options", "missing"),
    [
        ({"NODES": "2", "NODE_RANK": "0"}, ["--run.name", "x"], "HEAD"),
        ({"HEAD": "a:1", "NODE_RANK": "0"}, ["--run.name", "x"], "NODES"),
        ({"HEAD": "a:1", "NODES": "2"}, ["--run.name", "x"], "NODE_RANK"),
        ({"HEAD": "a:1", "NODES": "2", "NODE_RANK": "0"}, ["--config", "digits"], "--run.name"),
    ],
)
def test_what_is_missing_is_named(variables: dict[str, str], options: list[str], missing: str, tmp_path: Path) -> None:
    process = start(LAUNCH / "multinode.sh", *options, cwd=tmp_path, **variables)
    assert process.wait(timeout=20) == 2
    assert f"error: {missing} is not given" in output(tmp_path)
