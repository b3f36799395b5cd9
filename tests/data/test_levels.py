"""Wherever the images lie, on the device, on the host or on the disk, the training is the same bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rank_tasks
import torch
from PIL import Image
from ranks import Ranks

from iic_dist import distributed
from iic_dist.config.build import load_data
from iic_dist.config.command_line import parse
from iic_dist.data.host import HostImages
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.training.trainer import Trainer

QUIET = ["--monitor.progress", "false", "--train.evaluate_every", "0", "--train.epochs", "2", "--model.sub_heads", "2"]
LEVELS = {"device": ["--data.device_budget_gib", "1"], "host": ["--data.device_budget_gib", "0"]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 coloured files in two folders and one that is no image."""
    root = tmp_path_factory.mktemp("levels")
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, size=(20, 16, 3), dtype=np.uint8)
        path = root / "pictures" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (root / "pictures" / "bad.png").write_bytes(b"")
    return root


def folder_options(root: Path) -> list[str]:
    return [
        *QUIET,
        *("--data.name", f"folder:{root / 'pictures'}", "--data.cache", str(root / "cache"), "--data.workers", "0"),
        *("--data.image_size", "16", "--data.folder_labels", "true", "--data.batch_size", "8"),
        *("--views.policy", "simclr"),
    ]


def trained(arguments: list[str], folder: Path) -> tuple[Trainer, dict]:
    config = parse(arguments)
    trainer = Trainer(config, load_data(config, Place()), Place(), torch.device("cpu"))
    return trainer, trainer.train(folder)


@pytest.mark.parametrize("schedule", ["joint", "alternate"])
def test_mapped_from_the_disk_by_the_host_or_resident(pictures: Path, tmp_path: Path, schedule: str) -> None:
    options = [*folder_options(pictures), "--train.schedule", schedule]
    (one, resident), (other, hosted) = (trained([*options, *LEVELS[level]], tmp_path / level) for level in LEVELS)
    assert isinstance(other.images, HostImages)
    assert isinstance(other.evaluator.images, HostImages)
    assert not isinstance(one.images, HostImages)
    for first, second in zip(one.learner.model.parameters(), other.learner.model.parameters(), strict=True):
        assert torch.equal(first, second)
    assert {**resident, "train_seconds": 0, "images_per_second": 0} == {
        **hosted, "train_seconds": 0, "images_per_second": 0,
    }  # fmt: skip
    assert one.data.unreadable == [("bad.png", "not an image, or its header is damaged")]


def test_images_in_memory_and_mapped_ones(pictures: Path) -> None:
    """The same images as a tensor that is not mapped."""
    config = parse(folder_options(pictures))
    data = load_data(config, Place())
    mapped = Trainer(config, data, Place(), torch.device("cpu"))
    copied = type(data.train)(data.train.name, data.train.images.clone(), data.train.labels, data.train.class_names)
    in_memory = Trainer(config, type(data)(copied, copied), Place(), torch.device("cpu"))
    for trainer in (mapped, in_memory):
        for position in range(5):
            trainer.train_step(trainer.schedule.passes(0)[0], position)
    for first, second in zip(mapped.learner.model.parameters(), in_memory.learner.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_the_next_batch_of_a_pass_is_asked_for_while_this_one_trains(pictures: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, list[int]]] = []

    class Noted(HostImages):
        def prefetch(self, indices: torch.Tensor) -> None:
            calls.append(("prefetch", indices.tolist()))
            super().prefetch(indices)

        def gather(self, indices: torch.Tensor):
            calls.append(("gather", indices.tolist()))
            return super().gather(indices)

    config = parse(folder_options(pictures))
    trainer = Trainer(config, load_data(config, Place()), Place(), torch.device("cpu"))
    trainer.images = Noted(trainer.data.train.images, torch.device("cpu"))
    [each] = trainer.schedule.passes(0)
    for position in range(each.steps):
        trainer.train_step(each, position)
    batches = [trainer.schedule.batches(0, each.heads, position)[0][1].indices.tolist() for position in range(5)]
    expected = [("gather", batches[0])]
    for batch in batches[1:]:
        expected += [("prefetch", batch), ("gather", batch)]
    assert calls == expected


def test_ranks_that_see_other_images_end_with_one_line(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(folder_options(pictures))
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, value, value + 1])
    with pytest.raises(UsageError, match=r"pictures holds other images for rank 2 than for rank 0"):
        load_data(config, Place())


def test_four_ranks_at_every_level(ranks: Ranks, pictures: Path) -> None:
    results = [
        ranks.run(4, rank_tasks.training_losses, [*folder_options(pictures), *LEVELS[level]], 4) for level in LEVELS
    ]
    for resident, hosted in zip(*results, strict=True):
        assert resident["losses"] == hosted["losses"]
        assert torch.equal(resident["parameters"], hosted["parameters"])
        assert resident["accuracy"] == hosted["accuracy"]
    assert torch.equal(results[0][0]["parameters"], results[0][1]["parameters"])
