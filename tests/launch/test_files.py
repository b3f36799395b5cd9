"""What can be said of the files in launch/ without starting them: shell, Kubernetes' schema, the image's contents."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import IoK8sApiCoreV1PersistentVolumeClaim, TrainerV1alpha1TrainJob
from launched import LAUNCH, ROOT, end, output, start, wait_until
from slurm_cluster import free_ports

from iic_dist.config.command_line import parse

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
STARTED = [path for path in SCRIPTS if path.name != "run_folder.sh"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck: apt-get install shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "path", [*STARTED, LAUNCH / "trainjob.yaml", LAUNCH / "Dockerfile"], ids=lambda path: path.name
)
def test_a_file_starts_with_how_to_call_it(path: Path) -> None:
    head = path.read_text().split("\n\n")[0].splitlines()
    calls = [line for line in head if line.startswith("#     ") and path.name.split(".")[0] in line]
    assert calls, head
    assert path.suffix not in (".sh", ".sbatch") or os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ([], "runs/mine"),
        (["--run.name", "a", "--run.name", "b"], "runs/b"),
        (["--run.name=a b", "--config", "digits", "--run.root", "/r"], "/r/a b"),
        (["--run.root=/r"], "/r/mine"),
        (["--data.root", "x", "--run.seed", "3"], "runs/mine"),
    ],
)
def test_the_folder_of_a_run_is_what_the_trainers_options_say(options: list[str], folder: str) -> None:
    script = f'source {shlex.quote(str(LAUNCH / "run_folder.sh"))}; run_folder "$@"; echo "$folder"'
    done = subprocess.run(["bash", "-euc", script, "bash", "mine", *options], capture_output=True, text=True)
    assert done.stdout == f"{folder}\n", done.stderr


def documents() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all((LAUNCH / "trainjob.yaml").read_text())}


@pytest.mark.parametrize(
    ("kind", "model"),
    [("TrainJob", TrainerV1alpha1TrainJob), ("PersistentVolumeClaim", IoK8sApiCoreV1PersistentVolumeClaim)],
)
def test_kubernetes_knows_every_field(kind: str, model: Any) -> None:
    """The models are generated from the schema that Kubeflow Trainer publishes; they drop fields that it has not."""
    document = documents()[kind]
    assert model.from_dict(document).to_dict() == document
    document["spec"]["nodes"] = 2
    assert model.from_dict(document).to_dict() != document


def test_the_trainjob_keeps_its_runs_on_the_volume() -> None:
    job = documents()["TrainJob"]
    assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    config = parse(job["spec"]["trainer"]["args"])
    [node] = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    [mount] = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == config.run.root]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
    claim = documents()["PersistentVolumeClaim"]["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim
    assert config.run.name, "a pod that starts again must find its run"
    [script] = job["spec"]["trainer"]["command"]
    assert (ROOT / script).exists()


def test_the_trainjobs_variables_are_all_that_multinode_needs(tmp_path: Path) -> None:
    """They are those of the torch plugin: kubeflow/trainer, pkg/runtime/framework/plugins/torch/torch.go, 06b555d."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\necho "$@"\n')
    torchrun.chmod(0o755)
    kubeflow = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1", "PET_MASTER_PORT": "29500"}
    variables = {**kubeflow, "PET_MASTER_ADDR": "iic-dist-node-0-0.iic-dist", "PYTHON": str(torchrun)}
    arguments = documents()["TrainJob"]["spec"]["trainer"]["args"]
    process = start(LAUNCH / "multinode.sh", *arguments, cwd=tmp_path, **variables)
    assert process.wait(timeout=20) == 0
    said = output(tmp_path)
    for wanted in (
        *("--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=iic-dist-node-0-0.iic-dist:29500", "is_host=0"),
        *("--rdzv-id=iic-dist", f"-m iic_dist.train {' '.join(arguments)}"),
    ):
        assert wanted in said


def instructions() -> list[list[str]]:
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_copies_all_that_an_installation_needs(tmp_path: Path) -> None:
    """No image is built here: there is no base to be had. What it copies is installed as it installs it."""
    source, there = tmp_path / "source", tmp_path / "there"
    source.mkdir()
    for name, rest in instructions():
        assert name in {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "CMD"}
        if name == "COPY":
            *paths, target = rest.split()
            for path in paths:
                copied = source / (path if target == "./" else target)
                (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, copied)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(there),
        ".",
    ]
    environment = {**os.environ, "IIC_DIST_BUILD": "none"}
    done = subprocess.run(pip, cwd=source, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (there / "iic_dist" / "config" / "presets" / "digits.yaml").exists()
    [command] = [rest for name, rest in instructions() if name == "CMD"]
    assert os.access(source / command.strip('[]"'), os.X_OK)


def test_tensorboard_listens_on_this_machine_alone(tmp_path: Path) -> None:
    [port] = free_ports(1)

    def listening() -> set[str]:
        """The addresses of all sockets that listen on the port, as the kernel writes them."""
        lines = [Path(f"/proc/net/{name}").read_text().splitlines() for name in ("tcp", "tcp6")]
        sockets = [line.split() for line in itertools.chain(*lines)]
        local = [fields[1].split(":") for fields in sockets if fields[3] == "0A"]
        return {address for address, number in local if int(number, 16) == port}

    process = start(LAUNCH / "tensorboard.sh", "--logdir", ".", "--port", str(port), cwd=tmp_path)
    try:
        wait_until(lambda: bool(listening()), 120, lambda: output(tmp_path))
        assert listening() <= {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1, ::1
    finally:
        end(process)
