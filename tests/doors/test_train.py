"""The training command on folders that ask for care; in this process, on real files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_runs import write_digits

from iic_dist import train as command
from iic_dist.config.command_line import parse
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.training.stop import StopSignals

pytestmark = pytest.mark.usefixtures("one_thread")

BRIEF = [
    *("--model.num_clusters", "3", "--run.threads", "1", "--run.device", "cpu", "--monitor.progress", "false"),
    *("--model.sub_heads", "2", "--train.evaluate_every", "0", "--train.epochs", "1"),
]


def arguments(images: Path, *options: str) -> list[str]:
    beside = ["--run.root", str(images.parent / "runs"), "--data.cache", str(images.parent / "decoded")]
    return ["--data.name", f"folder:{images}", *beside, *BRIEF, *options]


def run(images: Path, *options: str) -> Path:
    """Train as the command does; return the folder of all runs."""
    config, chosen = command.read(arguments(images, *options), Place())
    command.train(config, Place(), StopSignals(), chosen)
    return images.parent / "runs"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_preset_for_a_gpu_is_what_a_cpu_can_do_on_one(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ResNet-18 for 450 epochs took weeks there."""
    monkeypatch.setattr(command, "choose_device", lambda name, place: torch.device(device))
    config, chosen = command.read(["--config", "cifar10", "--train.epochs", "9"], Place())
    said = capsys.readouterr().out
    assert {"model.backbone", "optim.lr"} <= chosen  # a run goes on with what it began with, also on another machine
    assert "train.epochs" not in chosen
    assert config.train.epochs == 9
    if device == "cpu":
        assert said.startswith("cifar10 on a CPU: ")
        assert "model.backbone medium_cnn, " in said
        assert "train.epochs" not in said
    else:
        assert (config.model.backbone, said) == ("resnet18", "")


def test_ten_good_files_of_a_hundred_are_ten_images(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The batch was chosen for the files, and refused because it was larger than the images."""
    write_digits(images, 10)
    for number in range(90):
        (images / f"{number}.png").write_bytes(b"no image")
    for path in sorted(images.rglob("[012]/*.png"))[:3]:
        path.write_bytes(path.read_bytes()[:-30])  # its header can be read
    runs = run(images)
    assert "--data.batch_size 4, because no more than 7 of the images can be read" in capsys.readouterr().out
    assert json.loads((runs / "images-1" / "result.json").read_text())["num_images"] == 7
    assert parse(["--config", str(runs / "images-1" / "config.yaml")]).data.batch_size == 4


def test_one_image_is_nothing_to_cluster(images: Path) -> None:
    """It ended in a traceback of the contrastive loss."""
    Image.effect_noise((9, 9), 50).save(images / "alone.png")
    (images / "bad.png").write_bytes(b"no image")
    with pytest.raises(UsageError) as refused:
        run(images)
    assert str(refused.value) == f"folder:{images} holds 1 image that can be read: there is nothing to cluster"
    assert not (images.parent / "runs" / "images-1").exists()
    with pytest.raises(UsageError, match="^data.batch_size=1: must be 2 or more"):
        parse(arguments(images, "--data.batch_size", "1"))


@contextlib.contextmanager
def walks(folder: Path) -> Iterator[list[str]]:
    """Note each folder below one whose names are listed."""
    seen: list[str] = []
    before = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).startswith(str(folder)):
            seen.append(str(path))
        return before(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        yield seen


def test_a_kept_listing_is_trusted_by_all_that_look(images: Path) -> None:
    """With --data.relist false every rank still walked over all files, to choose settings."""
    write_digits(images, 30)
    folders = 4
    with walks(images) as seen:
        run(images, "--data.relist", "false")
    assert len(seen) == folders  # nothing was kept yet
    with walks(images) as seen:
        run(images, "--data.relist", "false")
        command.read(arguments(images, "--data.relist", "false"), Place(1, 2, 1, 2))
    assert seen == []
    with walks(images) as seen:
        command.read(arguments(images), Place(1, 2, 1, 2))
    assert seen == []  # rank 0 looks for all
    with walks(images) as seen:
        run(images)
    assert len(seen) == 2 * folders  # to choose settings, and to decode
