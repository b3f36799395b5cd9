"""Ranks that were asked for different things do not train together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iic_dist import distributed
from iic_dist.config.command_line import parse
from iic_dist.config.same import check_same
from iic_dist.errors import UsageError

DIFFERENT = [
    ("run.seed", "1"),
    ("run.timeout_minutes", "3"),
    ("data.batch_size", "64"),
    ("data.train_on", "train"),
    ("views.repeats", "2"),
    ("views.crop_area", "[0.5,1.0]"),
    ("views.mean", "[0.5]"),
    ("model.num_clusters", "11"),
    ("model.num_clusters", "[5,10]"),
    ("model.backbone", "resnet18"),
    ("loss.entropy_weight", "1.5"),
    ("loss.prior", "free"),
    ("optim.lr", "0.3"),
    ("optim.name", "sgd"),
    ("train.epochs", "7"),
    ("train.schedule", "alternate"),
    ("train.order", "[clustering,overclustering,contrastive]"),
    ("train.precision", "float64"),
    ("neighbours.steps", "10"),
    ("monitor.progress", "false"),
]


@pytest.mark.parametrize(("name", "value"), DIFFERENT)
def test_a_difference_is_one_line_that_names_field_and_values(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents with different settings trained together without a word, or waited for each other for ever."""
    own, theirs = parse([]), parse([f"--{name}", value])
    group, _, field = name.partition(".")
    before, now = (getattr(getattr(config, group), field) for config in (own, theirs))
    gathered: list[Any] = []
    monkeypatch.setattr(distributed, "gather_objects", lambda settings: gathered.append(settings) or [settings])
    check_same(own)
    check_same(theirs)
    monkeypatch.setattr(distributed, "gather_objects", lambda settings: gathered)
    with pytest.raises(UsageError) as refused:
        check_same(own)
    assert str(refused.value) == (
        f"rank 1 was started with {name}={now!r}, rank 0 with {before!r}: start all ranks with the same settings"
    )


def test_what_was_chosen_from_the_files_is_rank_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that arrive between two ranks' looks at a folder are no mistake of the caller."""
    gathered: list[Any] = []
    monkeypatch.setattr(distributed, "gather_objects", lambda settings: gathered.append(settings) or [settings])
    check_same(parse(["--data.image_size", "40"]), {"data.image_size"})
    check_same(parse(["--data.image_size", "41"]), {"data.image_size"})
    assert gathered[0] == gathered[1]


def test_two_agents_with_different_settings_both_end(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "iic_dist.train", "--train.epochs", "1", "--run.root", str(tmp_path)]
        command += ["--optim.lr", "0.3"] if rank else []
        ranks.append(
            subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    for process in ranks:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 2, said
        (line,) = [line for line in said.splitlines() if line.startswith("error:")]
        assert line.startswith("error: rank 1 was started with optim.lr=0.3, rank 0 with 0.002: ")
    assert list(tmp_path.iterdir()) == []
