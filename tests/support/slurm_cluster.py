"""A Slurm of Debian's slurm-wlm and munge on this host alone: one controller, two nodes that share its cores."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from pathlib import Path

from launched import wait_until

NODES = ("n0", "n1")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")

# No cgroups and no affinity: processes are found by their parents, which root may see. Credentials that expire soon let
# a job that was queued again start soon: it waits until those of its last start are invalid.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=60
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldParameters=enable_configless
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores} State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Say why no Slurm can be started here; None where it can."""
    if os.geteuid() != 0:
        return "needs root, as which slurmd starts jobs"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(missing)}: apt-get install slurm-wlm munge" if missing else None


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Slurm:
    """The daemons and their folder: `start` them; `close` ends them and what they run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = str(folder / "slurm.conf")
        self.environment = {**os.environ, "SLURM_CONF": self.configuration}
        self._daemons: list[subprocess.Popen[bytes]] = []
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        cores = os.cpu_count()
        text = CONFIGURATION.format(host=host, ports=free_ports(3), folder=folder, cores=cores)
        (folder / "slurm.conf").write_text(text)

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        folder = self.folder
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        wait_until((folder / "munge.socket").exists, 30, self.logs)
        self._start("slurmctld", "-D")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        wait_until(lambda: self.command("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 30, self.logs)

    def _start(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def command(self, *command: str) -> str:
        """Run a command of Slurm's; return what it prints, or "" where it fails."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def field(self, job: str, name: str) -> str:
        """Return a field of a job, e.g. JobState or Restarts."""
        pairs = self.command("scontrol", "-o", "show", "job", job).split()
        return next((pair.split("=", 1)[1] for pair in pairs if pair.startswith(f"{name}=")), "")

    def close(self) -> None:
        if jobs := self.command("squeue", "-h", "-o", "%A").split():
            self.command("scancel", *jobs)
            wait_until(lambda: not self.command("squeue", "-h").strip(), 90, self.logs)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(timeout=90)
